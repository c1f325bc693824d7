# SPDX-License-Identifier: Apache-2.0
"""What of a request has to be read: it fits into the reader's memory and is not cached already.

Chunks that are in the page cache as a whole are left out.  Asking costs one system call for a
request of which nothing is cached, or all of it, and one a chunk for the others; a worker that
reads a cached chunk maps it and touches every page, on a CPU that the reader may need.  Pages that
the kernel is reading ahead by itself are in the page cache already, and so they are not asked of
the device a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pagecache_bpf.agent.read_threads import Extent
from pagecache_bpf.agent.worker import CHUNK_BYTES
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE


@dataclass(frozen=True)
class Parts:
    """What becomes of a request.

    Attributes:
        read: its parts that are to be read, in order.
        cached: bytes that are in the page cache.
        refused: bytes for which the reader has no memory, at the request's end.
    """

    read: list[Extent]
    cached: int
    refused: int


@contextmanager
def parts_of(extent: Extent, window: int | None) -> Iterator[Parts]:
    """Find out what becomes of a request.

    Its file stays open in the block, so that what is read there need not open it again.  Where the
    kernel does not tell what is cached, or the file cannot be opened, all of it is to be read:
    whoever does meets the same error, and counts it.

    Args:
        extent: what is asked for.
        window: bytes that may be read ahead of its reader; None: no bound.

    Yields:
        Its parts.
    """
    length = extent.length
    if window is not None and window < length:
        length = window // PAGE_SIZE * PAGE_SIZE
    refused = extent.length - length
    end = extent.start + length
    if not length:
        yield Parts([], 0, refused)
        return
    try:
        fd = extent.file.acquire()
    except OSError:
        yield Parts([replace(extent, length=length)], 0, refused)
        return
    try:
        read = [
            replace(extent, start=start, length=stop - start)
            for start, stop in _missing(fd, extent.start, end)
        ]
        yield Parts(read, length - sum(part.length for part in read), refused)
    finally:
        extent.file.release()


def _missing(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """List where the parts begin and end that are not cached; neighbors are one part."""
    try:
        cached = cached_pages(fd, start, end - start)
        if not cached:
            return [(start, end)]
        if cached >= _pages(end - start):
            return []
        parts: list[tuple[int, int]] = []
        at = start
        while at < end:
            stop = min(end, (at // CHUNK_BYTES + 1) * CHUNK_BYTES)
            if cached_pages(fd, at, stop - at) < _pages(stop - at):
                begin = parts.pop()[0] if parts and parts[-1][1] == at else at
                parts.append((begin, stop))
            at = stop
        return parts
    except OSError:
        return [(start, end)]


def _pages(length: int) -> int:
    """Count the pages of so many bytes."""
    return -(-length // PAGE_SIZE)
