# SPDX-License-Identifier: Apache-2.0
"""Reads given ranges of files into the page cache, once, and waits for them: prefetch().

It needs no policy and no controller.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from pagecache_bpf.agent import read_threads, worker
from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.loads.unprivileged_window import free_memory

#: How often a reader that may be told to give up looks whether it was, in seconds.
_LOOK_SECONDS = 0.05


def wanted(
    files: Sequence[Path], extents: Sequence[tuple[int, int]] | None, budget: int | None
) -> list[tuple[Path, list[tuple[int, int]]]]:
    """Choose what of some files to read, in whole pages, and cut it where the budget ends.

    Args:
        files: the files, in the order in which they are read.
        extents: offset and length in bytes of the ranges to read of each file; None: all of it.
        budget: bytes to read at most; None: half of the memory that is free.

    Returns:
        For each file of which something is to be read, its offsets and lengths in bytes.

    Raises:
        UsageError: a range does not lie in a file.
        OSError: a file is gone.
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
            start = offset // PAGE_SIZE * PAGE_SIZE
            count = min(offset + length - start, left) if length else 0
            if count > 0:
                parts.append((start, count))
                left -= count
        if parts:
            found.append((path, parts))
    return found


def read(
    path: Path,
    parts: Sequence[tuple[int, int]],
    node: int | None,
    over: threading.Event | None = None,
) -> int:
    """Read ranges of a file into the page cache with several threads, and wait for them.

    Args:
        path: the file.
        parts: offset and length in bytes of each range, from page boundaries.
        node: the NUMA node on whose CPUs the threads run, so that the pages come from it; None:
            any.
        over: from when it is set nothing more is read; None: everything is.

    Returns:
        Bytes that were read; less than was asked for where reading failed or was given up.
    """
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

    def wait() -> None:
        for _ in parts:
            while not left.acquire(timeout=_LOOK_SECONDS):
                if over is not None and over.is_set():
                    return

    source = read_threads.Source(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    workers = read_threads.Executor(count, read=read_chunk)
    try:
        for start, length in parts:
            workers.submit(read_threads.Extent(source, start, length, 0))
        wait()
    finally:
        workers.stop()
    return workers.totals.read_bytes
