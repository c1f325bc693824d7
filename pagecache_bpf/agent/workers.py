# SPDX-License-Identifier: Apache-2.0
"""Worker processes, one for each memory cgroup and NUMA node of the readers, and their queues.

A spare process stands ready where the agent is, so that a reader in another cgroup costs a move and
not a start.  A process in another cgroup ends when it has been idle for a second, so that the
cgroup of a container that has ended can be removed.
"""

from __future__ import annotations

import errno
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pagecache_bpf.agent import worker
from pagecache_bpf.agent.read_threads import Extent, Settled, Totals, drop
from pagecache_bpf.agent.worker import DONE
from pagecache_bpf.agent.worker_process import WorkerPlace, WorkerProcess, move
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
#: The same while something is being read.
LOADING_SECONDS = 30.0


@dataclass
class Charged:
    """Whether pages are charged to the readers' memory cgroups; `status` tells it.

    Attributes:
        moves: how many worker processes were to be moved to a reader's cgroup.
        refused: how many of these could not be, by errno.
    """

    moves: int = 0
    refused: dict[int, int] = field(default_factory=dict)  # by errno


class Pools:
    """Carries out what policies ask for, by worker processes; drops are made in this process.

    Args:
        settled: called with an extent, the offset and the bytes of a part of it that is read,
            cancelled or failed; from a thread of this class, or from the caller's of submit() and
            cancel().
        depth_of: tells how many chunks of a device (MAJOR:MINOR) are read at once.
        started: told the number of each worker process.

    Attributes:
        totals: what has been carried out so far.
        charged: whether pages are charged to the readers' cgroups.

    Raises:
        OSError: no process can be started.
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
        self._processes: dict[WorkerPlace, WorkerProcess] = {}
        self._spare: WorkerProcess | None = None
        self._spare_taken = 0.0
        self._number = 0
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
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
        """Queue an extent, to be read or to be dropped.

        Args:
            extent: byte range of a file to read or drop, with the reader that it is for.
            place: where its pages go; None: the agent's own cgroup, any node.
        """
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
                    process = self._process_for(place or WorkerPlace())
                except OSError as error:  # no process can be started: the reader reads by itself
                    self._count(error.errno or errno.EAGAIN)
                    failed = [(extent, extent.start + extent.length, extent.length)]
                else:
                    self._number += 1
                    process.waiting.append((self._number, extent))
                    failed = self._feed(process)
        self._report(failed)

    def cancel(self, owner: int | None, file: object | None = None) -> None:
        """Take extents that are to be read out of the queues; what is being read is finished.

        Args:
            owner: the process that they are read for; None: every one.
            file: the Source of their file; None: every one.
        """
        with self._lock:
            gone = self._forget(
                lambda extent: owner in (None, extent.owner) and file in (None, extent.file)
            )
        self._report(gone)

    def _forget(self, meant: Callable[[Extent], bool]) -> list[tuple[Extent, int, int]]:
        """Take extents out of the queues, as far as nobody reads them; under the lock."""
        gone: list[tuple[Extent, int, int]] = []
        for process in self._processes.values():
            for item in [queued for queued in process.waiting if meant(queued[1])]:
                process.waiting.remove(item)
                extent = item[1]
                gone.append((extent, extent.start + extent.length, extent.length))
            for number, job in process.open.items():
                if meant(job.extent):
                    process.cancel(number)
        self.totals.cancelled_bytes += sum(length for _, _, length in gone)
        return gone

    def _submit_drop(self, extent: Extent) -> None:
        """Queue a drop behind the reads of its range, whose pages would come back otherwise.

        Reads of it that have not begun are cancelled.
        """
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
                for process in self._processes.values()
                for number, job in process.open.items()
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
        """Queue a drop for the thread that drops."""
        with self._dropping:
            self._drops.append(extent)
            self._dropping.notify()

    def _is_over(self, number: int) -> None:
        """Queue the drops that have waited for an extent that nobody reads any more."""
        waiting = []
        for extent, busy in self._after:
            busy.discard(number)
            if busy:
                waiting.append((extent, busy))
            else:
                self._queue_drop(extent)
        self._after = waiting

    def settle(self, seconds: float) -> bool:
        """Wait until nothing is being read of files that nobody wants any more (Source.over).

        Args:
            seconds: how long at most.

        Returns:
            False if it takes longer.
        """
        with self._ended:
            return self._ended.wait_for(
                lambda: (
                    not any(
                        job.extent.file.over
                        for process in self._processes.values()
                        for job in process.open.values()
                    )
                ),
                seconds,
            )

    def set_depth(self, device: str) -> None:
        """Tell the processes that read from a device how many chunks they may read at once now.

        Args:
            device: MAJOR:MINOR.
        """
        with self._lock:
            for place, process in self._processes.items():
                if place.device == device:
                    process.set_depth(self._depth_of(device))

    def queued_bytes(self, device: str | None = None) -> int:
        """Count the bytes that are queued or being read.

        Args:
            device: of one device, MAJOR:MINOR; None: of all.

        Returns:
            Bytes.
        """
        with self._lock:
            processes = [
                p for place, p in self._processes.items() if device in (None, place.device)
            ]
            return sum(process.load for process in processes)

    def pids(self) -> list[int]:
        """List the worker processes, the spare one included.

        Returns:
            Numbers of processes.
        """
        with self._lock:
            found = [*self._processes.values(), self._spare]
            return [process.popen.pid for process in found if process is not None]

    def stop(self) -> None:
        """Empty the queues and end the worker processes; `settled` is not called any more."""
        with self._lock, self._dropping:
            self._stopping = True
            self._drops.clear()
            self._drops_again.clear()
            self._dropping.notify()
            self._wake_receiver()
        for thread in self._threads:
            thread.join()
        for process in [*self._processes.values(), *([self._spare] if self._spare else [])]:
            process.close()
            _let_go(process)
        self._selector.close()
        self._woken.close()
        self._waker.close()

    # --- the parts ---

    def _start(self) -> WorkerProcess:
        """Start a worker process, and listen to what it tells.  Raises OSError."""
        process = WorkerProcess()
        self._started(process.popen.pid)
        self._selector.register(process.socket, selectors.EVENT_READ, process)
        return process

    def _wake_receiver(self) -> None:
        """Make the receiver's select() return, so that it looks at what has changed."""
        with suppress(OSError):
            self._waker.send(b".")

    def _process_for(self, place: WorkerPlace) -> WorkerProcess:
        """Return the process that reads at a place; the spare one is moved there if there is none.

        Raises OSError if none can be started.
        """
        process = self._processes.get(place)
        if process is None:
            process, self._spare = self._spare or self._start(), None
            self._spare_taken = time.monotonic()
            if place.cgroup is not None:
                self.charged.moves += 1
                code = move(process, place.cgroup)
                if code:
                    refused = self.charged.refused
                    refused[code] = refused.get(code, 0) + 1
                else:
                    process.lend()
            process.bind(place.node, cpus_of(place.node))
            process.set_depth(self._depth_of(place.device))
            process.place = place
            self._processes[place] = process
            self._wake_receiver()  # the receiver makes a new spare when it is time
        return process

    def _feed(self, process: WorkerProcess) -> list[tuple[Extent, int, int]]:
        """Give a process extents up to HELD; return the parts of those that could not be opened."""
        failed = []
        while process.waiting and len(process.open) < HELD:
            number, extent = process.waiting.popleft()
            try:
                fd = extent.file.acquire()
            except OSError as error:
                self._count(error.errno or errno.EIO)
                failed.append((extent, extent.start + extent.length, extent.length))
                continue
            # Open here until it is read: what is asked of the file meanwhile need not open it.
            process.read(number, extent, fd)
        return failed

    def _count(self, code: int) -> None:
        """Count a failed call by its errno."""
        self.totals.errors += 1
        self.totals.by_errno[code] = self.totals.by_errno.get(code, 0) + 1

    def _report(self, parts: list[tuple[Extent, int, int]]) -> None:
        """Tell whoever made this object of parts (extent, end, length) that are settled."""
        for extent, end, length in parts:
            self._settled(extent, end - length, length)

    def _receive(self) -> None:
        """Take what processes tell, start a spare one when it is time, and end idle ones."""
        while not self._stopping:
            busy = self._processes or self._spare is None
            for key, _ in self._selector.select(IDLE_SECONDS / 4 if busy else None):
                if key.data is None:
                    with suppress(BlockingIOError):
                        self._woken.recv(4096)
                else:
                    self._report(self._take(key.data))
            with self._lock:
                if self._stopping:
                    return
                if self._spare is None and self._is_time_for_spare():
                    self._spare_taken = time.monotonic()  # if it cannot be started: tried again
                    with suppress(OSError):
                        self._spare = self._start()
                self._end_idle()

    def _is_time_for_spare(self) -> bool:
        """Tell whether a spare process may be started: it takes CPU time that a load may need."""
        since = time.monotonic() - self._spare_taken
        reading = any(process.open or process.waiting for process in self._processes.values())
        return since >= (LOADING_SECONDS if reading else SPARE_SECONDS)

    def _take(self, process: WorkerProcess) -> list[tuple[Extent, int, int]]:
        """Take what a process has told; return the settled parts, joined by extent."""
        settled: dict[int, tuple[Extent, int, int]] = {}
        alive = True
        while True:
            try:
                data = process.socket.recv(DONE.size, socket.MSG_DONTWAIT)
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
                held = process.open[number]
                held.left -= length
                if not held.left:
                    process.open.pop(number).extent.file.release()
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
            parts += self._feed(process) if alive else self._died(process)
            if not process.open:
                process.idle_since = time.monotonic()
            self._ended.notify_all()
        return parts

    def _died(self, process: WorkerProcess) -> list[tuple[Extent, int, int]]:
        """Clean up after a process that was killed (by the OOM killer of its cgroup, say).

        Its extents have failed, and are returned.  A lent one that had none may have left by
        itself, when this process was stopped for a while: that is no failure.
        """
        self._selector.unregister(process.socket)
        had_work = bool(process.open or process.waiting)
        lost = [(job.extent, job.left) for job in process.open.values()]
        lost += [(extent, extent.length) for _, extent in process.waiting]
        for number in process.open:
            self._is_over(number)
        _let_go(process)
        process.waiting.clear()
        if self._processes.get(process.place) is process:
            del self._processes[process.place]
        if self._spare is process:
            self._spare = None
        process.close()
        if had_work or process.popen.returncode != 0:
            self._count(errno.ECHILD)
        return [(extent, extent.start + extent.length, left) for extent, left in lost]

    def _end_idle(self) -> None:
        """End processes that are idle in a reader's cgroup: it could not be removed with them."""
        now = time.monotonic()
        for place, process in list(self._processes.items()):
            if process.open or process.waiting or now < process.idle_since + IDLE_SECONDS:
                continue
            if place.cgroup is None:
                continue
            del self._processes[place]
            self._selector.unregister(process.socket)
            process.close()

    def _drop(self) -> None:
        """Carry out drops, one after the other; pages that stay are tried again a little later."""
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


def _let_go(process: WorkerProcess) -> None:
    """Close the files of what a process that has ended was reading."""
    for job in process.open.values():
        job.extent.file.release()
    process.open.clear()
