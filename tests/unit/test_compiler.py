# SPDX-License-Identifier: Apache-2.0
"""The compiler driver: which clang, what its errors become."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError, UnsupportedError, UsageError
from pagecache_bpf.policy import compiler
from pagecache_bpf.policy.compiler import CompileError, compile_policy, find_clang


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    find_clang.cache_clear()
    yield
    find_clang.cache_clear()


def fake(directory: Path, name: str, script: str) -> Path:
    """A program of that name in a directory of its own on PATH."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.delenv("CLANG", raising=False)
    return directory


def test_no_clang_says_how_to_get_it(only: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"not found. Install clang") as caught:
        find_clang()
    assert caught.value.exit_code == 3


def test_the_newest_that_works_is_taken(only: Path) -> None:
    fake(only, "clang-9", "exit 0")
    fake(only, "clang-15", "exit 0")
    fake(only, "clang-20", "exit 1")
    fake(only, "clang-format-21", "exit 0")
    assert find_clang() == str(only / "clang-15")


def test_clang_itself_comes_first(only: Path) -> None:
    fake(only, "clang-15", "exit 0")
    plain = fake(only, "clang", "exit 0")
    assert find_clang() == str(plain)


def test_a_clang_that_is_too_old_is_named(only: Path) -> None:
    old = fake(only, "clang-11", "exit 1")
    with pytest.raises(UnsupportedError, match="too old") as caught:
        find_clang()
    assert str(old) in str(caught.value)


def test_the_environment_chooses(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(only, "clang", "exit 0")
    mine = fake(only, "my-clang", "exit 0")
    monkeypatch.setenv("CLANG", str(mine))
    assert find_clang() == str(mine)


def test_the_real_clang_passes_the_probe() -> None:
    # The tests above see fakes only.
    assert os.access(find_clang(), os.X_OK)


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "LIBBPF_HEADERS", (tmp_path,))
    with pytest.raises(UnsupportedError, match=r"libbpf's headers: .*`make deps`"):
        compiler.include_dirs()


def test_a_missing_source_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        compile_policy(tmp_path / "absent.bpf.c")


def wrong_policy(directory: Path) -> Path:
    path = directory / "wrong.bpf.c"
    lines = [f"int f{i}(void) {{ return undeclared_{i}; }}" for i in range(5)]
    path.write_text("\n".join(lines))
    return path


def test_compile_errors_are_boiled_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "include_dirs", lambda: [])
    source = wrong_policy(tmp_path)
    with pytest.raises(CompileError) as caught:
        compile_policy(source, tmp_path / "x.o", log_dir=tmp_path / "logs")
    text = str(caught.value)
    assert f"{source}:1:" in text and "undeclared_0" in text and "undeclared_2" in text
    assert "undeclared_3" not in text and "and 2 more errors" in text
    log = caught.value.log_path
    assert log is not None and str(log) in text
    assert "undeclared_4" in log.read_text()
    assert not (tmp_path / "x.o").exists()
    assert isinstance(caught.value, PagecacheError) and caught.value.exit_code == 1


def test_an_unwritable_log_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "include_dirs", lambda: [])
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CompileError, match="undeclared_0") as caught:
        compile_policy(wrong_policy(tmp_path), tmp_path / "x.o", log_dir=blocker / "logs")
    assert caught.value.log_path is None
