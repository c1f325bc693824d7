# SPDX-License-Identifier: Apache-2.0
"""Reads what clients ask for by `prefetch`: each user has a queue and workers of its own.

The workers are those of engine agent: processes in the client's memory cgroup, bound to the node
that was asked for, so that the pages are charged and placed as if the client had read them.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pagecache_bpf.agent.queue_depth import DEFAULT_DEPTH
from pagecache_bpf.agent.read_threads import Extent, Source
from pagecache_bpf.agent.worker_process import WorkerPlace
from pagecache_bpf.agent.workers import Pools
from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.inspectors import Owner
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.file_key import reopen_descriptor
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

#: Of one user, whatever the memory has room for: a queue longer than this is no window.
QUEUE_BYTES = 64 << 30
#: Files of one user that are read at a time: each is an open descriptor.
FILES = 1024
#: The workers' nice value: they get what nobody else wants of the processors.
NICE = 19
#: Users who prefetch at a time: each has worker processes of 33 tasks.
USERS = 32


@dataclass
class _Queued:
    """A file that is read: whose, for which connection, bytes that are not settled, how to open."""

    owner: Owner
    connection: int
    key: bytes
    left: int
    source: Source


class PrefetchQueues:
    """The users' queues; made when first needed.

    Args:
        started: told the number of each worker process, whose reads are no client's.
    """

    def __init__(self, started: Callable[[int], None]) -> None:
        self._tell_started = started
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_files = min(FILES, limit // 64)
        self._lock = threading.Lock()
        self._of: dict[Owner, Pools] = {}
        self._starting: set[Owner] = set()
        self._started_one = threading.Condition(self._lock)
        self._left: dict[int, _Queued] = {}  # by the descriptor that is held for it

    def submit(
        self,
        owner: Owner,
        connection: int,
        cgroup: Path | None,
        fd: int,
        file: ClientFile,
        extents: Sequence[Sequence[int]],
        node: int,
        room: int | None,
    ) -> tuple[int, int]:
        """Queue ranges of an open file.

        Args:
            owner: whose queue they go to.
            connection: the number of the connection that they are cancelled with.
            cgroup: the memory cgroup that the pages are charged to; None: that of this process.
            fd: the file; it stays the caller's.
            file: what it is.
            extents: offset and length, in bytes.
            node: the NUMA node for the pages; -1: any.
            room: bytes that memory has room for; None: no bound.

        Returns:
            Bytes queued and bytes refused.

        Raises:
            PagecacheError: no process can be started to read them.
        """
        status = os.fstat(fd)
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        place = WorkerPlace(device, cgroup, node)
        pools = self._pools(owner)
        with self._lock:
            if self._of.get(owner) is not pools:
                raise PagecacheError("nothing was prefetched", "its connection is over")
            queued = sum(queued.left for queued in self._left.values() if queued.owner == owner)
            bound = QUEUE_BYTES if room is None else min(QUEUE_BYTES, room)
            wanted, refused = cut(extents, file.size, bound - queued)
            total = sum(length for _, length in wanted)
            if not total:
                return 0, refused
            # One descriptor for the file, held until the last that was asked of it is settled.
            held = self._held(connection, file.key)
            if held is None:
                mine = sum(queued.owner == owner for queued in self._left.values())
                if mine >= self._most_files:
                    return 0, sum(length for _, length in extents)
                held = reopen_descriptor(fd)
                source = Source(partial(os.dup, held))
                self._left[held] = _Queued(owner, connection, file.key, 0, source)
            source = self._left[held].source
            self._left[held].left += total
        for start, length in wanted:
            pools.submit(Extent(source, start, length, held, node), place)
        return total, refused

    def _held(self, connection: int, key: bytes) -> int | None:
        """Return the descriptor that a connection's requests of a file hold; under the lock."""
        for held, queued in self._left.items():
            if queued.connection == connection and queued.key == key and not queued.source.over:
                return held
        return None

    def cancel(self, connection: int) -> None:
        """Forget what a connection has asked for; what is being read is finished.

        Args:
            connection: its number.
        """
        with self._lock:
            over = [
                (self._of[queued.owner], queued.source)
                for queued in self._left.values()
                if queued.connection == connection and queued.owner in self._of
            ]
        for pools, source in over:
            source.over = True
            pools.cancel(None, source)

    def queued_bytes(self) -> int:
        """Return the bytes that are queued or being read, of all users."""
        with self._lock:
            return sum(queued.left for queued in self._left.values())

    def sweep(self, connected: Collection[Owner]) -> None:
        """End the workers of users that have gone, once they have nothing to do.

        Args:
            connected: the users that have a connection.
        """
        with self._lock:
            busy = {queued.owner for queued in self._left.values()}
            gone = [owner for owner in self._of if owner not in connected and owner not in busy]
            over = [self._of.pop(owner) for owner in gone]
        for pools in over:
            pools.stop()

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            over, self._of = list(self._of.values()), {}
        for pools in over:
            pools.cancel(None)
            pools.stop()

    def _pools(self, owner: Owner) -> Pools:
        """Return a user's workers; starting them holds up nobody else.  Raises PagecacheError."""
        with self._lock:
            self._started_one.wait_for(lambda: owner not in self._starting)
            pools = self._of.get(owner)
            if pools is not None:
                return pools
            if len(self._of) + len(self._starting) >= USERS:
                raise PagecacheError(
                    "nothing was prefetched",
                    f"{USERS} other users prefetch at this moment",
                    "Read by yourself, or try again later",
                )
            self._starting.add(owner)
        try:
            pools = self._start()
        finally:
            with self._lock:
                self._starting.discard(owner)
                if pools is not None:
                    self._of[owner] = pools
                self._started_one.notify_all()
        return pools

    def _start(self) -> Pools:
        """Start the workers of one more user.  Raises PagecacheError."""
        what = "nothing was prefetched"
        try:
            return Pools(self._settled, lambda _: DEFAULT_DEPTH, self._started)
        except (OSError, RuntimeError) as error:
            raise PagecacheError(
                what, f"no process can be started: {error}", "Raise the controller's TasksMax"
            ) from error

    def _started(self, pid: int) -> None:
        """Lower the priority of a new worker: readers that wait and root's requests come first."""
        self._tell_started(pid)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, NICE)  # its threads come later, and inherit it

    def _settled(self, extent: Extent, start: int, length: int) -> None:
        """Take note that a part of a request is read, cancelled or failed; workers call this."""
        with self._lock:
            queued = self._left.get(extent.owner)
            if queued is None:
                return
            if queued.left > length:
                queued.left -= length
                return
            del self._left[extent.owner]
        os.close(extent.owner)


def cut(
    extents: Sequence[Sequence[int]], size: int, room: int
) -> tuple[list[tuple[int, int]], int]:
    """Cut ranges of a file to page boundaries, to its end, and to so many bytes in all.

    Args:
        extents: offset and length of each, in bytes.
        size: bytes of the file.
        room: bytes in all.

    Returns:
        Offset and length of what is left of each, and the bytes that were cut off.
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


def foreign_cgroup(pid: int) -> Path | None:
    """Return the memory cgroup of a process.

    Args:
        pid: the process.

    Returns:
        Its directory; None: it is this process's, or cannot be told.
    """
    with suppress(PagecacheError):
        found = cgroups.directory_of(pid)
        if found != cgroups.directory_of(os.getpid()):
            return found
    return None
