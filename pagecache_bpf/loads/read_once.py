# SPDX-License-Identifier: Apache-2.0
"""Reads given parts of files into the page cache, once, and waits for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from pagecache_bpf.agent import read_threads, worker
from pagecache_bpf.errors import UsageError
from pagecache_bpf.loads.unprivileged_window import free_memory

_PAGE = os.sysconf("SC_PAGE_SIZE")


def wanted(
    files: Sequence[Path], extents: Sequence[tuple[int, int]] | None, budget: int | None
) -> list[tuple[Path, list[tuple[int, int]]]]:
    """For each file the whole pages to read, cut where the budget ends.

    Raises UsageError for extents that do not lie in the file.
    """
    left = budget if budget is not None else free_memory() // 2
    found = []
    for path in files:
        size = path.stat().st_size
        parts = []
        for offset, length in [(0, size)] if extents is None else extents:
            if not 0 <= offset <= size or not 0 <= length <= size - offset:
                raise UsageError(
                    f"bytes {offset} to {offset + length} do not lie in {path}",
                    f"it has {size} bytes",
                )
            start = offset // _PAGE * _PAGE
            count = min(offset + length - start, left)
            if count > 0:
                parts.append((start, count))
                left -= count
        if parts:
            found.append((path, parts))
    return found


def read(path: Path, parts: Sequence[tuple[int, int]], node: int | None) -> int:
    """Read the parts with several threads, on a node's CPUs if one is given; bytes read."""
    from pagecache_bpf import topology

    cpus = frozenset(topology.read().cpus_of(node)) if node is not None else frozenset()
    left = threading.Semaphore(0)
    bound = threading.local()

    def read_chunk(fd: int, start: int, length: int) -> None:
        if not hasattr(bound, "done"):
            bound.done = True
            if allowed := os.sched_getaffinity(0) & cpus:
                os.sched_setaffinity(0, allowed)
        worker.by_populate(fd, start, length)

    settled = [0]

    def count(extent: read_threads.Extent, start: int, length: int) -> None:
        if start + length >= extent.start + extent.length:
            left.release()
        settled[0] += length

    source = read_threads.Source(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    workers = read_threads.Executor(count, read=read_chunk)
    try:
        for start, length in parts:
            workers.submit(read_threads.Extent(source, start, length, 0))
        for _ in parts:
            left.acquire()
    finally:
        workers.stop()
    return workers.totals.read_bytes
