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

from pagecache_bpf.agent.worker import CHUNK_BYTES, by_populate
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

WORKERS = 8


def drop(fd: int, start: int, length: int) -> int:
    """Drop clean pages that nobody maps; how many bytes went.  Raises OSError."""
    before = cached_pages(fd, start, length)
    os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    return max(0, before - cached_pages(fd, start, length)) * PAGE_SIZE


@dataclass(frozen=True)
class Extent:
    """A part of a file to read or to drop, in bytes.

    owner: whom a cancellation names.  file: opens it, and says which one it is.
    """

    file: Source
    start: int
    length: int
    owner: int
    node: int = -1
    drop: bool = False


class Source:
    """A file that is opened when there is work for it and closed when there is none.

    Nothing is held in between, so that it can be deleted and its file system unmounted.
    """

    def __init__(self, opener: Callable[[], int]) -> None:
        self.done = 0  # bytes: read up to here
        self.over = False  # nobody wants it any more: nothing of it is begun
        self._opener = opener
        self._lock = threading.Lock()
        self._fd = -1
        self._users = 0

    def acquire(self) -> int:
        """An open descriptor, until release().  Raises OSError."""
        with self._lock:
            if self._fd < 0:
                self._fd = self._opener()
            self._users += 1
            return self._fd

    def release(self) -> None:
        """The work is done."""
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self._fd)
                self._fd = -1


@dataclass
class _Job:
    extent: Extent
    at: int  # the next chunk begins here


@dataclass
class Totals:
    """What has been carried out, in bytes and calls."""

    read_bytes: int = 0
    dropped_bytes: int = 0
    cancelled_bytes: int = 0
    errors: int = 0
    by_errno: dict[int, int] = field(default_factory=dict)


#: Called with an extent and a part of it that is settled now: read, cancelled or failed.
Settled = Callable[[Extent, int, int], None]


class Executor:
    """Worker threads and the queue they share.

    settled: called from the workers, a chunk at a time.
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
        """Queue an extent."""
        with self._wake:
            self._jobs.append(_Job(extent, extent.start))
            self._wake.notify_all()

    def cancel(self, owner: int | None, file: Source | None = None) -> None:
        """Forget what is queued for an owner, in a file; None stands for every one.

        What is being read is finished.
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
        """Forget the queue and end the workers; what they are reading is finished."""
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
