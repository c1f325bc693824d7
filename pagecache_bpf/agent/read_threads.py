# SPDX-License-Identifier: Apache-2.0
"""Reads what policies ask for, with ordinary system calls, from several threads.

Each worker takes the next chunk in the order of the requests, so that the device sees one
sequential stream of a few large requests, whatever the number of workers: sixteen threads
with a part of the file each get half the speed.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pagecache_bpf.agent.worker import CHUNK_BYTES, by_populate, call_reader
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

WORKERS = 8


def drop(fd: int, start: int, length: int) -> int:
    """Drop clean, unmapped pages of a range of an open file from the page cache.

    Args:
        fd: the file's descriptor.
        start: the first byte, at a page boundary.
        length: bytes of the range; 0: up to the end of the file.

    Returns:
        Bytes that were cached before and are not afterwards; 0 if others brought in as much
        meanwhile.

    Raises:
        OSError: the file system refuses.
    """
    before = cached_pages(fd, start, length)
    os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    return max(0, before - cached_pages(fd, start, length)) * PAGE_SIZE


@dataclass(frozen=True)
class Extent:
    """A range of a file that is to be read into the page cache, or to be dropped from it.

    Attributes:
        file: the file.
        start: the first byte.
        length: bytes.
        owner: the process (thread group) that a later cancellation names.
        node: the NUMA node that its pages should come from; -1: any.
        drop: whether the range is dropped instead of read.
    """

    file: Source
    start: int
    length: int
    owner: int
    node: int = -1
    drop: bool = False


class Source:
    """A file that is opened when there is work for it and closed when there is none.

    Nothing is held in between, so that the file can be deleted and its file system unmounted.

    Args:
        opener: opens the file and returns the descriptor; raises OSError.

    Attributes:
        done: the offset in bytes up to which it has been read ahead.
        over: set when nobody wants the file any more; from then on nothing of it is begun.
    """

    def __init__(self, opener: Callable[[], int]) -> None:
        self.done = 0  # bytes: read up to here
        self.over = False  # nobody wants it any more: nothing of it is begun
        self._opener = opener
        self._lock = threading.Lock()
        self._fd = -1
        self._users = 0

    def acquire(self) -> int:
        """Open the file, or share the descriptor of those who have it open.

        Returns:
            The descriptor, valid until the matching release().

        Raises:
            OSError: the file cannot be opened.
        """
        with self._lock:
            if self._fd < 0:
                self._fd = self._opener()
            self._users += 1
            return self._fd

    def release(self) -> None:
        """Give back a descriptor from acquire(); the last one to do so closes the file."""
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self._fd)
                self._fd = -1


@dataclass
class _Job:
    """An extent in the queue, of which everything before `at` has been taken by a thread."""

    extent: Extent
    at: int  # the next chunk begins here


@dataclass
class Totals:
    """Counters of what the read threads have carried out so far.

    Attributes:
        read_bytes: bytes of extents that were read, those that were in the page cache before too.
        dropped_bytes: bytes that left the page cache.
        cancelled_bytes: bytes that were taken out of the queue before they were read.
        errors: system calls that failed.
        by_errno: the same, by errno.
    """

    read_bytes: int = 0
    dropped_bytes: int = 0
    cancelled_bytes: int = 0
    errors: int = 0
    by_errno: dict[int, int] = field(default_factory=dict)


#: Called with an extent and a part of it that is settled now: read, cancelled or failed.
Settled = Callable[[Extent, int, int], None]


class Executor:
    """Threads that read and drop extents, and the queue that they share.

    Args:
        settled: called from the threads with an extent, the offset and the bytes of a part of it
            that is read, cancelled or failed, a chunk at a time.
        workers: how many threads.
        chunk: bytes that a thread reads at a time; chunks end at multiples of it.
        read: reads a range of an open file into the page cache: descriptor, offset, bytes.
    """

    def __init__(
        self,
        settled: Settled,
        workers: int = WORKERS,
        chunk: int = CHUNK_BYTES,
        read: Callable[[int, int, int], None] = by_populate,
    ) -> None:
        self.totals = Totals()
        self._settled = settled
        self._chunk = chunk
        self._read = read
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"prefetch-{n}", daemon=True)
            for n in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, extent: Extent) -> None:
        """Add an extent at the end of the queue.

        Args:
            extent: what to read or to drop.
        """
        with self._wake:
            self._jobs.append(_Job(extent, extent.start))
            self._wake.notify_all()

    def cancel(self, owner: int | None, file: Source | None = None) -> None:
        """Take extents that are to be read out of the queue; what a thread is reading is finished.

        Args:
            owner: the process that asked for them; None: every one.
            file: the file that they are of; None: every one.
        """
        gone: list[tuple[Extent, int, int]] = []
        with self._wake:
            for job in list(self._jobs):
                extent = job.extent
                if extent.drop:
                    continue
                if owner in (None, extent.owner) and file in (None, extent.file):
                    gone.append((extent, job.at, extent.start + extent.length - job.at))
                    self._jobs.remove(job)
        for extent, start, length in gone:
            self.totals.cancelled_bytes += length
            self._settled(extent, start, length)

    @property
    def queued_bytes(self) -> int:
        """Bytes that no worker has taken yet."""
        with self._wake:
            return sum(job.extent.start + job.extent.length - job.at for job in self._jobs)

    def stop(self) -> None:
        """Empty the queue and end the threads, after what they are reading.

        `settled` is not called for what was in the queue.
        """
        with self._wake:
            self._stopping = True
            self._jobs.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> tuple[Extent, int, int] | None:
        """Take the next chunk: extent, start and length; None at the end."""
        with self._wake:
            while not self._jobs:
                if self._stopping:
                    return None
                self._wake.wait()
            if self._stopping:
                return None
            job = self._jobs[0]
            extent, start = job.extent, job.at
            end = extent.start + extent.length
            # Chunks end where aligned ones do: a huge page cannot begin elsewhere.
            stop = min(end, (start // self._chunk + 1) * self._chunk) if not extent.drop else end
            job.at = stop
            if stop >= end:
                self._jobs.popleft()
            return extent, start, stop - start

    def _work(self) -> None:
        """Carry out one chunk after another until stop(); one that fails is counted and settled."""
        call_reader()
        while (taken := self._next()) is not None:
            extent, start, length = taken
            try:
                fd = extent.file.acquire()
                try:
                    if extent.drop:
                        gone = drop(fd, start, length)  # first: += reads the sum before it calls
                        self.totals.dropped_bytes += gone
                    else:
                        self._read(fd, start, length)
                        self.totals.read_bytes += length
                finally:
                    extent.file.release()
            except OSError as error:
                self.totals.errors += 1
                code = error.errno or 0
                self.totals.by_errno[code] = self.totals.by_errno.get(code, 0) + 1
            self._settled(extent, start, length)
