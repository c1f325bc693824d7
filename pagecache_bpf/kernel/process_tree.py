# SPDX-License-Identifier: Apache-2.0
"""Which processes a process has started, as procfs tells it, and nothing else of them."""

from __future__ import annotations

import os
from pathlib import Path

_MAX_PROCESSES = 64  # tensor-parallel workers of one host; more cost more than they tell


def descendants(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Return a process and those it has started, directly or not.

    Args:
        pid: the process.
        proc: where procfs is mounted.

    Returns:
        Numbers of processes, `pid` first; at most 64.
    """
    pids = [pid]
    for parent in pids:
        try:
            for task in os.listdir(proc / str(parent) / "task"):
                text = (proc / str(parent) / "task" / task / "children").read_text()
                pids += [int(child) for child in text.split()]
        except FileNotFoundError:  # it ended, or the kernel lacks CONFIG_PROC_CHILDREN
            if not (proc / str(pid) / "task" / str(pid) / "children").exists():
                return _descendants_by_parent(pid, proc)
        except OSError:
            continue
        if len(pids) >= _MAX_PROCESSES:
            break
    return pids[:_MAX_PROCESSES]


def _descendants_by_parent(pid: int, proc: Path) -> list[int]:
    """Find the descendants by the parent of every process, where the kernel lists no children."""
    children: dict[int, list[int]] = {}
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                text = (proc / name / "stat").read_text(errors="replace")
                children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(name))
            except (OSError, IndexError):
                continue
    pids = [pid]
    for parent in pids:
        pids += children.get(parent, [])
    return pids[:_MAX_PROCESSES]
