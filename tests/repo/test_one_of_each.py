# SPDX-License-Identifier: Apache-2.0
"""What the package needs in many places stands in one: kernel files, the page size, prototypes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pagecache_bpf"
#: By its path, because it is a program of its own that imports the standard library only.
ALONE = {"agent/worker.py"}
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def kernel_files_in(tree: ast.AST) -> Iterator[int]:
    """Lines of calls of os, open() and Path() that are given a path of procfs or sysfs."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func)
        text = ast.unparse(node.args[0]).lstrip("f").strip("'\"")
        if (name.startswith("os.") or name in {"open", "Path", "io.open"}) and text.startswith(
            ("/proc/", "/sys/")
        ):
            yield node.lineno


def test_an_access_to_a_kernel_file_is_found() -> None:
    for line in ('os.stat("/proc/self")', 'open(f"/proc/{pid}/io")', 'x = Path("/sys/block")'):
        assert list(kernel_files_in(ast.parse(line))) == [1], line
    assert not list(kernel_files_in(ast.parse('LIVE.read("/proc/self"); print("/sys/block")')))


def test_kernel_files_are_read_in_one_place() -> None:
    found = {name: list(kernel_files_in(tree)) for name, tree in SOURCES.items()}
    allowed = {
        "kernel/kernelfs.py",
        "kernel/file_key.py",  # descriptors of this process, which are opened again
        "kernel/direct_io.py",
        "agent/pressure.py",  # a file that is kept open and written
        "policy/loader.py",  # bpffs: opened by bpf(2)
    }
    assert not {name for name, lines in found.items() if lines} - allowed, found


@pytest.mark.parametrize("function", ["mmap", "munmap", "mincore", "cachestat", "statx"])
def test_a_function_of_the_c_library_is_declared_once(function: str) -> None:
    places = [
        name
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "argtypes"
        and ast.unparse(node.value).rpartition(".")[2] == function
    ]
    assert len(set(places) - ALONE) <= 1, places


def test_the_page_size_is_asked_for_once() -> None:
    asking = {"mmap.PAGESIZE", "resource.getpagesize", "os.sysconf('SC_PAGE_SIZE')"}
    places = {
        name
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Call) and ast.unparse(node) in asking
    }
    assert places == {"kernel/file_pages.py"}
