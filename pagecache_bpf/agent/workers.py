# SPDX-License-Identifier: Apache-2.0
"""Worker processes, one for each memory cgroup and NUMA node of the readers, and their queues.

A process that waits for work stands ready where the agent is; a reader in another cgroup costs it
a move, not a start.  It goes back when it has been idle for a second, so that the cgroup of a
container that has ended can be removed.
"""

from __future__ import annotations

import errno
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pagecache_bpf.agent import worker
from pagecache_bpf.agent.read_threads import Extent, Settled, Totals, drop
from pagecache_bpf.agent.worker import DONE, ENVIRONMENT, ORDER
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.numa import cpus_of

IDLE_SECONDS = 1.0
#: A page that is locked or mapped stays when it is dropped: it is tried again, so much later.
DROP_TRIES = 3
DROP_AGAIN_SECONDS = 0.1
#: Extents that a worker holds, with an open file each; the others wait here.
HELD = 32
#: The first worker is waited for: a load may follow at once.
READY_SECONDS = 30.0
#: Another one is started so much later than the last was taken: not while a load begins.
SPARE_SECONDS = 1.0


@dataclass(frozen=True)
class WorkerPlace:
    """Where pages go, and from which device, MAJOR:MINOR.

    cgroup: its directory (None: the agent's own); node: NUMA, -1: any.
    """

    device: str = ""
    cgroup: Path | None = None
    node: int = -1


@dataclass
class _Open:
    extent: Extent
    left: int


class Pool:
    """One worker process.  Not thread-safe: Pools holds its lock around every call."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", worker.__file__, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    env=ENVIRONMENT,
                )
            except BaseException:
                ours.close()
                raise
        self.socket = ours
        self.place = WorkerPlace()
        self.waiting: deque[tuple[int, Extent]] = deque()
        self.open: dict[int, _Open] = {}
        self.idle_since = time.monotonic()

    @property
    def load(self) -> int:
        """Bytes that are queued or being read."""
        waiting = sum(extent.length for _, extent in self.waiting)
        return waiting + sum(job.left for job in self.open.values())

    def set_depth(self, depth: int) -> None:
        """How many chunks are read at once."""
        self._order(worker.DEPTH, depth)

    def bind(self, node: int, cpus: str) -> None:
        """Run on those CPUs, take memory from that node."""
        self._order(worker.BIND, node, data=cpus.encode())

    def read(self, number: int, extent: Extent, fd: int) -> None:
        """Begin an extent."""
        self.open[number] = _Open(extent, extent.length)
        self._order(worker.READ, 0, number, extent.start, extent.length, fd=fd)

    def cancel(self, number: int) -> None:
        """Forget what has not begun of an extent; its rest comes back as ECANCELED."""
        self._order(worker.CANCEL, 0, number)

    def close(self) -> None:
        """End the process; what it reads is finished by the kernel."""
        self.socket.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _order(
        self,
        operation: int,
        argument: int,
        number: int = 0,
        start: int = 0,
        length: int = 0,
        data: bytes = b"",
        fd: int = -1,
    ) -> None:
        message = ORDER.pack(operation, argument, number, start, length) + data
        with suppress(OSError):  # one that has died is found by the receiver
            if fd < 0:
                self.socket.send(message)
            else:
                socket.send_fds(self.socket, [message], [fd])


@dataclass
class Charged:
    """Whether pages are charged where they should be; for `status`."""

    moves: int = 0
    refused: dict[int, int] = field(default_factory=dict)  # by errno


class Pools:
    """Carries out what policies ask for.

    settled: called with an extent, the end and the length of a part that is read, cancelled or
    failed; from a thread of its own.  depth_of: chunks at once, by device.  started: told new pids.
    """

    def __init__(
        self,
        settled: Settled,
        depth_of: Callable[[str], int],
        started: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.totals = Totals()
        self.charged = Charged()
        self._settled = settled
        self._started = started
        self._depth_of = depth_of
        self._lock = threading.RLock()
        self._ended = threading.Condition(self._lock)  # something has been read
        self._pools: dict[WorkerPlace, Pool] = {}
        self._spare: Pool | None = None
        self._spare_taken = 0.0
        self._number = 0
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._spare = self._start()
        self._selector.select(READY_SECONDS)
        self._drops: deque[Extent] = deque()
        self._after: list[tuple[Extent, set[int]]] = []  # drops, and the reads they wait for
        self._drops_again: deque[tuple[float, int, Extent]] = deque()  # when, tries left
        self._dropping = threading.Condition()
        self._threads = [
            threading.Thread(target=self._receive, name="pools", daemon=True),
            threading.Thread(target=self._drop, name="drops", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, extent: Extent, place: WorkerPlace | None = None) -> None:
        """Queue an extent."""
        if extent.drop:
            self._submit_drop(extent)
            return
        with self._lock:
            if self._stopping:
                return
            if extent.file.over:  # it came while its file was let go
                self.totals.cancelled_bytes += extent.length
                failed = [(extent, extent.start + extent.length, extent.length)]
            else:
                try:
                    pool = self._pool(place or WorkerPlace())
                except OSError as error:  # no process can be started: the reader reads by itself
                    self._count(error.errno or errno.EAGAIN)
                    failed = [(extent, extent.start + extent.length, extent.length)]
                else:
                    self._number += 1
                    pool.waiting.append((self._number, extent))
                    failed = self._feed(pool)
        self._report(failed)

    def cancel(self, owner: int | None, file: object | None = None) -> None:
        """Forget what is queued for an owner, in a file; None stands for every one.

        What is being read is finished.
        """
        with self._lock:
            gone = self._forget(
                lambda extent: owner in (None, extent.owner) and file in (None, extent.file)
            )
        self._report(gone)

    def _forget(self, meant: Callable[[Extent], bool]) -> list[tuple[Extent, int, int]]:
        """Take these out of the queues, as far as nobody reads them; under the lock."""
        gone: list[tuple[Extent, int, int]] = []
        for pool in self._pools.values():
            for item in [queued for queued in pool.waiting if meant(queued[1])]:
                pool.waiting.remove(item)
                extent = item[1]
                gone.append((extent, extent.start + extent.length, extent.length))
            for number, job in pool.open.items():
                if meant(job.extent):
                    pool.cancel(number)
        self.totals.cancelled_bytes += sum(length for _, _, length in gone)
        return gone

    def _submit_drop(self, extent: Extent) -> None:
        """What was asked for before would come in after it has been dropped, and stay."""
        end = extent.start + extent.length

        def inside(other: Extent) -> bool:
            return (
                other.file is extent.file
                and extent.start <= other.start
                and other.start + other.length <= end
            )

        with self._lock:
            gone = self._forget(inside)
            busy = {
                number
                for pool in self._pools.values()
                for number, job in pool.open.items()
                if job.extent.file is extent.file
                and job.extent.start < end
                and extent.start < job.extent.start + job.extent.length
            }
            if busy:
                self._after.append((extent, busy))
            else:
                self._queue_drop(extent)
        self._report(gone)

    def _queue_drop(self, extent: Extent) -> None:
        with self._dropping:
            self._drops.append(extent)
            self._dropping.notify()

    def _is_over(self, number: int) -> None:
        """Nothing of that extent is being read any more: drops that waited for it can go on."""
        waiting = []
        for extent, busy in self._after:
            busy.discard(number)
            if busy:
                waiting.append((extent, busy))
            else:
                self._queue_drop(extent)
        self._after = waiting

    def settle(self, seconds: float) -> bool:
        """Wait until nothing is being read of files that are over, for so long at most."""
        with self._ended:
            return self._ended.wait_for(
                lambda: (
                    not any(
                        job.extent.file.over
                        for pool in self._pools.values()
                        for job in pool.open.values()
                    )
                ),
                seconds,
            )

    def set_depth(self, device: str) -> None:
        """How many chunks of a device are read at once has changed."""
        with self._lock:
            for place, pool in self._pools.items():
                if place.device == device:
                    pool.set_depth(self._depth_of(device))

    def queued_bytes(self, device: str | None = None) -> int:
        """Bytes that are queued or being read; of one device or of all."""
        with self._lock:
            pools = [p for place, p in self._pools.items() if device in (None, place.device)]
            return sum(pool.load for pool in pools)

    def pids(self) -> list[int]:
        """The worker processes."""
        with self._lock:
            found = [*self._pools.values(), self._spare]
            return [pool.process.pid for pool in found if pool is not None]

    def stop(self) -> None:
        """Forget the queue and end the workers."""
        with self._lock, self._dropping:
            self._stopping = True
            self._drops.clear()
            self._drops_again.clear()
            self._dropping.notify()
            self._ring()
        for thread in self._threads:
            thread.join()
        for pool in [*self._pools.values(), *([self._spare] if self._spare else [])]:
            pool.close()
        self._selector.close()
        self._bell.close()
        self._rope.close()

    # --- the parts ---

    def _start(self) -> Pool:
        pool = Pool()
        self._started(pool.process.pid)
        self._selector.register(pool.socket, selectors.EVENT_READ, pool)
        return pool

    def _ring(self) -> None:
        with suppress(OSError):
            self._rope.send(b".")

    def _pool(self, place: WorkerPlace) -> Pool:
        pool = self._pools.get(place)
        if pool is None:
            pool, self._spare = self._spare or self._start(), None
            self._spare_taken = time.monotonic()
            if place.cgroup is not None:
                self.charged.moves += 1
                code = _move(pool, place.cgroup)
                if code:
                    refused = self.charged.refused
                    refused[code] = refused.get(code, 0) + 1
            pool.bind(place.node, cpus_of(place.node))
            pool.set_depth(self._depth_of(place.device))
            pool.place = place
            self._pools[place] = pool
            self._ring()  # the receiver makes a new spare when it is time
        return pool

    def _feed(self, pool: Pool) -> list[tuple[Extent, int, int]]:
        failed = []
        while pool.waiting and len(pool.open) < HELD:
            number, extent = pool.waiting.popleft()
            try:
                fd = extent.file.acquire()
            except OSError as error:
                self._count(error.errno or errno.EIO)
                failed.append((extent, extent.start + extent.length, extent.length))
                continue
            try:
                pool.read(number, extent, fd)
            finally:
                extent.file.release()
        return failed

    def _count(self, code: int) -> None:
        self.totals.errors += 1
        self.totals.by_errno[code] = self.totals.by_errno.get(code, 0) + 1

    def _report(self, parts: list[tuple[Extent, int, int]]) -> None:
        for extent, end, length in parts:
            self._settled(extent, end - length, length)

    def _receive(self) -> None:
        while not self._stopping:
            busy = self._pools or self._spare is None
            for key, _ in self._selector.select(IDLE_SECONDS / 4 if busy else None):
                if key.data is None:
                    with suppress(BlockingIOError):
                        self._bell.recv(4096)
                else:
                    self._report(self._take(key.data))
            with self._lock:
                if self._stopping:
                    return
                if self._spare is None and time.monotonic() >= self._spare_taken + SPARE_SECONDS:
                    self._spare_taken = time.monotonic()  # if it cannot be started: tried again
                    with suppress(OSError):
                        self._spare = self._start()
                self._go_home()

    def _take(self, pool: Pool) -> list[tuple[Extent, int, int]]:
        """What a worker has told, its chunks joined by extent."""
        settled: dict[int, tuple[Extent, int, int]] = {}
        alive = True
        while True:
            try:
                data = pool.socket.recv(DONE.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                alive = False
                break
            code, number, length, end = DONE.unpack(data)
            if number == worker.READY:
                continue
            with self._lock:
                held = pool.open[number]
                held.left -= length
                if not held.left:
                    del pool.open[number]
                    self._is_over(number)
                if code == errno.ECANCELED:
                    self.totals.cancelled_bytes += length
                elif code:
                    self._count(code)
                else:
                    self.totals.read_bytes += length
            extent, last, sum_ = settled.get(number, (held.extent, 0, 0))
            settled[number] = (extent, max(last, end), sum_ + length)
        with self._lock:
            parts = list(settled.values())
            parts += self._feed(pool) if alive else self._died(pool)
            if not pool.open:
                pool.idle_since = time.monotonic()
            self._ended.notify_all()
        return parts

    def _died(self, pool: Pool) -> list[tuple[Extent, int, int]]:
        """A worker was killed (by the OOM killer of its cgroup, say): the rest has failed."""
        self._selector.unregister(pool.socket)
        self._count(errno.ECHILD)
        lost = [(job.extent, job.left) for job in pool.open.values()]
        lost += [(extent, extent.length) for _, extent in pool.waiting]
        for number in pool.open:
            self._is_over(number)
        pool.open.clear()
        pool.waiting.clear()
        if self._pools.get(pool.place) is pool:
            del self._pools[pool.place]
        if self._spare is pool:
            self._spare = None
        pool.close()
        return [(extent, extent.start + extent.length, left) for extent, left in lost]

    def _go_home(self) -> None:
        """Workers that have been idle leave the readers' cgroups."""
        now = time.monotonic()
        for place, pool in list(self._pools.items()):
            if pool.open or pool.waiting or now < pool.idle_since + IDLE_SECONDS:
                continue
            if place.cgroup is None:
                continue
            del self._pools[place]
            self._selector.unregister(pool.socket)
            pool.close()

    def _drop(self) -> None:
        while True:
            with self._dropping:
                while not self._drops:
                    if self._stopping:
                        return
                    wait = self._drops_again[0][0] - time.monotonic() if self._drops_again else None
                    if wait is not None and wait <= 0:
                        break
                    self._dropping.wait(wait)
                if self._drops:
                    extent, tries = self._drops.popleft(), DROP_TRIES
                else:
                    _, tries, extent = self._drops_again.popleft()
            left = 0
            try:
                fd = extent.file.acquire()
                try:
                    self.totals.dropped_bytes += drop(fd, extent.start, extent.length)
                    left = cached_pages(fd, extent.start, extent.length)
                finally:
                    extent.file.release()
            except OSError as error:
                self._count(error.errno or errno.EIO)
            if tries == DROP_TRIES:
                self._report([(extent, extent.start + extent.length, extent.length)])
            if left and tries > 1:
                due = time.monotonic() + DROP_AGAIN_SECONDS
                self._drops_again.append((due, tries - 1, extent))


def _move(pool: Pool, cgroup: Path) -> int:
    """Move a worker; an errno where that is refused, and then the agent's cgroup is charged."""
    try:
        (cgroup / "cgroup.procs").write_text(str(pool.process.pid))
    except OSError as error:
        return error.errno or errno.EIO
    return 0
