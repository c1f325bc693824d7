# SPDX-License-Identifier: Apache-2.0
"""Reads what clients ask for by `prefetch`: each user has a queue and workers of its own.

The workers are those of engine agent: processes in the client's memory cgroup, bound to the node
that was asked for, so that the pages are charged and placed as if the client had read them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from pagecache_bpf.agent.queue_depth import DEFAULT_DEPTH
from pagecache_bpf.agent.read_threads import Extent, Source
from pagecache_bpf.agent.workers import Place, Pools
from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

#: Of one user, whatever the memory has room for: a queue longer than this is no window.
QUEUE_BYTES = 64 << 30


class PrefetchQueues:
    """The users' queues; made when first needed.

    started: told the number of each worker process, whose reads are no client's.
    """

    def __init__(self, started: Callable[[int], None]) -> None:
        self._started = started
        self._lock = threading.Lock()
        self._of: dict[int, Pools] = {}
        self._left: dict[int, tuple[int, int]] = {}  # descriptor -> user, bytes not settled

    def submit(
        self,
        uid: int,
        pid: int,
        fd: int,
        file: ClientFile,
        extents: Sequence[Sequence[int]],
        node: int,
        room: int | None,
    ) -> tuple[int, int]:
        """Queue ranges of an open file; returns bytes queued and bytes refused.

        pid: whom the pages are charged to.  fd: stays the caller's.  room: bytes that memory has
        room for, None for no bound.
        """
        status = os.fstat(fd)
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        cgroup = None
        with suppress(PagecacheError):
            cgroup = cgroups.directory_of(pid)
            if cgroup == cgroups.directory_of(os.getpid()):
                cgroup = None
        place = Place(device, cgroup, node)
        with self._lock:
            pools = self._of.get(uid)
            if pools is None:
                pools = self._of[uid] = Pools(self._settled, lambda _: DEFAULT_DEPTH, self._started)
            queued = sum(left for user, left in self._left.values() if user == uid)
            bound = QUEUE_BYTES if room is None else min(QUEUE_BYTES, room)
            wanted, refused = cut(extents, file.size, bound - queued)
            total = sum(length for _, length in wanted)
            if not total:
                return 0, refused
            # One descriptor for the whole request, held until the last of it is settled.
            held = os.dup(fd)
            self._left[held] = (uid, total)
        source = Source(lambda: os.dup(held))
        for start, length in wanted:
            pools.submit(Extent(source, start, length, held, node), place)
        return total, refused

    def sweep(self, connected: Collection[int]) -> None:
        """End the workers of users that have gone, once they have nothing to do."""
        with self._lock:
            busy = {user for user, _ in self._left.values()}
            gone = [uid for uid in self._of if uid not in connected and uid not in busy]
            over = [self._of.pop(uid) for uid in gone]
        for pools in over:
            pools.stop()

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            over, self._of = list(self._of.values()), {}
        for pools in over:
            pools.cancel(None)
            pools.stop()

    def _settled(self, extent: Extent, start: int, length: int) -> None:
        """Called by the pools, holding no lock of this object."""
        with self._lock:
            uid, left = self._left.get(extent.owner, (0, 0))
            if left > length:
                self._left[extent.owner] = (uid, left - length)
                return
            if self._left.pop(extent.owner, None) is None:
                return
        os.close(extent.owner)


def cut(
    extents: Sequence[Sequence[int]], size: int, room: int
) -> tuple[list[tuple[int, int]], int]:
    """Ranges of a file from page boundaries, cut at its end and to so many bytes in all.

    Returns them and the bytes that were cut off.
    """
    found: list[tuple[int, int]] = []
    refused = 0
    for offset, length in extents:
        start = min(offset, size) // PAGE_SIZE * PAGE_SIZE
        stop = min(offset + length, size) if length else start
        take = max(0, stop - start)
        if take > room:
            take = max(0, room) // PAGE_SIZE * PAGE_SIZE
        refused += offset + length - max(offset, min(start + take, offset + length))
        if take:
            found.append((start, take))
            room -= take
    return found, refused
