# SPDX-License-Identifier: Apache-2.0
"""Reads what clients ask for by `prefetch`: each user has a queue and workers of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from pagecache_bpf.agent.executor import Executor, Extent, Source
from pagecache_bpf.cachestat import PAGE_SIZE
from pagecache_bpf.controller.files import File

WORKERS_PER_USER = 4
#: Of one user, whatever the memory has room for: a queue longer than this is no window.
QUEUE_BYTES = 64 << 30


class Prefetchers:
    """The users' executors; made when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[int, Executor] = {}
        self._left: dict[int, int] = {}  # descriptor -> bytes that are not settled

    def submit(
        self,
        uid: int,
        fd: int,
        file: File,
        extents: Sequence[Sequence[int]],
        node: int,
        room: int | None,
    ) -> tuple[int, int]:
        """Queue ranges of an open file; returns bytes queued and bytes refused.

        fd: stays the caller's.  room: bytes that memory has room for, None for no bound.
        """
        wanted: list[tuple[int, int]] = []
        with self._lock:
            executor = self._of.get(uid)
            if executor is None:
                executor = self._of[uid] = Executor(self._settled, WORKERS_PER_USER)
            queued = executor.queued_bytes
            left = QUEUE_BYTES - queued
            if room is not None:
                left = min(left, room - queued)
            total = refused = 0
            for offset, length in extents:
                start = min(offset, file.size) // PAGE_SIZE * PAGE_SIZE
                stop = min(offset + length, file.size)
                take = max(0, min(stop - start, left))
                take = take if take == stop - start else take // PAGE_SIZE * PAGE_SIZE
                refused += offset + length - max(offset, start + take) if length else 0
                if take:
                    wanted.append((start, take))
                    left -= take
                    total += take
            if not wanted:
                return 0, refused
            # One descriptor for the whole request, held until the last of it is settled.
            held = os.dup(fd)
            self._left[held] = total
            source = Source(lambda: os.dup(held))
            for start, length in wanted:
                executor.submit(Extent(source, start, length, held, node))
        return total, refused

    def forget(self, uid: int) -> None:
        """A user has no connection left: what it has asked for is not read any more."""
        with self._lock:
            executor = self._of.pop(uid, None)
        if executor is not None:
            executor.cancel(None)
            executor.stop()

    def close(self) -> None:
        """Forget everybody; what is being read is not waited for."""
        with self._lock:
            executors, self._of = list(self._of.values()), {}
        for executor in executors:
            executor.cancel(None)

    def _settled(self, extent: Extent, start: int, length: int) -> None:
        """Called by the workers."""
        with self._lock:
            self._left[extent.owner] -= length
            if self._left[extent.owner] > 0:
                return
            del self._left[extent.owner]
        os.close(extent.owner)
