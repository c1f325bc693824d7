# SPDX-License-Identifier: Apache-2.0
"""Processes that a process has started: of this machine, and of trees that are made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagecache_bpf.kernel.kernelfs import KernelFS
from pagecache_bpf.kernel.process_tree import descendants, is_alive


def add(root: Path, pid: int, parent: int, children: str | None = None, threads: int = 1) -> None:
    """Make what procfs has of a process; children: None where the kernel does not list them."""
    proc = root / "proc"
    for thread in range(threads):
        task = proc / str(pid) / "task" / str(pid + thread)
        task.mkdir(parents=True)
        if children is not None:
            (task / "children").write_text(children if thread == threads - 1 else "")
    # The name may hold spaces and parentheses.
    (proc / str(pid) / "stat").write_text(f"{pid} (a ) 9 b) S {parent} 0 0\n")


@pytest.mark.parametrize("listed", [True, False], ids=["children", "parents"])
def test_children_of_children_are_found(tmp_path: Path, listed: bool) -> None:
    tree = {10: (1, "20 30 "), 20: (10, "40 "), 30: (10, ""), 40: (20, ""), 50: (1, "")}
    for pid, (parent, children) in tree.items():
        add(tmp_path, pid, parent, children if listed else None)
    (tmp_path / "proc" / "meminfo").write_text("")
    found = descendants(10, KernelFS(tmp_path))
    assert found[0] == 10 and found[-1] == 40 and sorted(found) == [10, 20, 30, 40]
    assert descendants(50, KernelFS(tmp_path)) == [50]


def test_children_of_every_thread_count(tmp_path: Path) -> None:
    add(tmp_path, 10, 1, "20 ", threads=3)
    add(tmp_path, 20, 10, "")
    assert descendants(10, KernelFS(tmp_path)) == [10, 20]


def test_a_child_that_has_ended_is_passed_over(tmp_path: Path) -> None:
    add(tmp_path, 10, 1, "20 30 ")
    add(tmp_path, 30, 10, "40 ")
    add(tmp_path, 40, 30, "")
    assert descendants(10, KernelFS(tmp_path)) == [10, 20, 30, 40]


@pytest.mark.parametrize("listed", [True, False], ids=["children", "parents"])
def test_there_are_64_at_most(tmp_path: Path, listed: bool) -> None:
    children = range(100, 200)
    add(tmp_path, 10, 1, " ".join(map(str, children)) if listed else None)
    for pid in children:
        add(tmp_path, pid, 10, "" if listed else None)
    found = descendants(10, KernelFS(tmp_path))
    assert len(found) == 64 and found[0] == 10 and set(found[1:]) < set(children)


def test_those_of_this_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants(os.getpid()) and is_alive(child.pid)
        child.communicate(b"\n")
    assert not is_alive(child.pid)
