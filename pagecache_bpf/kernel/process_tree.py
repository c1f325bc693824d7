# SPDX-License-Identifier: Apache-2.0
"""Whether a process exists, and which processes it has started, as procfs tells it."""

from __future__ import annotations

from pagecache_bpf.kernel.kernelfs import LIVE, KernelFS

_MAX_PROCESSES = 64  # tensor-parallel workers of one host; more cost more than they tell


def is_alive(pid: int, kernel: KernelFS = LIVE) -> bool:
    """Tell whether a process exists.

    Args:
        pid: its number, as this process's /proc has it.
        kernel: where kernel files are read.

    Returns:
        Whether it does; a zombie does.
    """
    return kernel.exists(f"/proc/{pid}")


def descendants(pid: int, kernel: KernelFS = LIVE) -> list[int]:
    """Return a process and those it has started, directly or not.

    Args:
        pid: the process.
        kernel: where kernel files are read.

    Returns:
        Numbers of processes, `pid` first; at most 64.
    """
    pids = [pid]
    for parent in pids:
        for task in kernel.entries(f"/proc/{parent}/task"):
            text = kernel.read(f"/proc/{parent}/task/{task}/children")
            if text is not None:
                pids += [int(child) for child in text.split()]
            elif not kernel.exists(f"/proc/{pid}/task/{pid}/children"):
                # Not a thread that has ended: the kernel lacks CONFIG_PROC_CHILDREN.
                return _descendants_by_parent(pid, kernel)
        if len(pids) >= _MAX_PROCESSES:
            break
    return pids[:_MAX_PROCESSES]


def _descendants_by_parent(pid: int, kernel: KernelFS) -> list[int]:
    """Find the descendants by the parent of every process, where the kernel lists no children."""
    children: dict[int, list[int]] = {}
    for name in kernel.entries("/proc"):
        if name.isdigit():
            fields = (kernel.read(f"/proc/{name}/stat") or "").rpartition(")")[2].split()
            if len(fields) > 1:  # it still exists
                children.setdefault(int(fields[1]), []).append(int(name))
    pids = [pid]
    for parent in pids:
        pids += children.get(parent, [])
    return pids[:_MAX_PROCESSES]
