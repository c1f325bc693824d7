# SPDX-License-Identifier: Apache-2.0
"""One worker process as the agent sees it: how it is started, told what to read, and moved.

worker is the program that runs in it; workers decides which process reads what.
"""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.agent import worker
from pagecache_bpf.agent.read_threads import Extent
from pagecache_bpf.agent.worker import ENVIRONMENT, ORDER


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker brings pages in, and from which device.

    Attributes:
        device: MAJOR:MINOR of the file system's device.
        cgroup: the directory of the memory cgroup that is charged; None: the agent's own.
        node: the NUMA node that pages come from; -1: any.
    """

    device: str = ""
    cgroup: Path | None = None
    node: int = -1


@dataclass
class OpenExtent:
    """An extent that a worker process has taken, with the bytes of it that are not settled yet."""

    extent: Extent
    left: int


class WorkerProcess:
    """A worker process.  Not thread-safe: Pools holds its lock around every call.

    Attributes:
        popen: the process.
        socket: this end of the connection to it.
        place: where it reads; the default while it is spare.
        waiting: numbers and extents that it has not been given yet.
        open: extents that it is reading, by their numbers.
        idle_since: when it had nothing to read for the last time, in seconds of the monotonic
            clock.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.popen = subprocess.Popen(
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
        self.open: dict[int, OpenExtent] = {}
        self.idle_since = time.monotonic()

    @property
    def load(self) -> int:
        """Bytes that are queued for the process or being read by it."""
        waiting = sum(extent.length for _, extent in self.waiting)
        return waiting + sum(job.left for job in self.open.values())

    def set_depth(self, depth: int) -> None:
        """Set how many chunks the process reads at once.

        Args:
            depth: chunks, of worker.CHUNK_BYTES each.
        """
        self._order(worker.DEPTH, depth)

    def bind(self, node: int, cpus: str) -> None:
        """Have the process run on some CPUs and take its memory from a NUMA node.

        Args:
            node: the node's number; -1: any.
            cpus: numbers of the CPUs, separated by spaces.
        """
        self._order(worker.BIND, node, data=cpus.encode())

    def lend(self) -> None:
        """Tell the process that it is in a reader's cgroup, which it leaves when it is idle."""
        self._order(worker.LENT, 0)

    def read(self, number: int, extent: Extent, fd: int) -> None:
        """Have an extent read.

        Args:
            number: by which the process tells how it goes.
            extent: byte range of a file that the worker is to bring into the page cache.
            fd: its file, open for reading; the process gets a duplicate.
        """
        self.open[number] = OpenExtent(extent, extent.length)
        self._order(worker.READ, 0, number, extent.start, extent.length, fd=fd)

    def cancel(self, number: int) -> None:
        """Take what has not begun of an extent out of the queue; that comes back as ECANCELED.

        Args:
            number: the extent's.
        """
        self._order(worker.CANCEL, 0, number)

    def close(self) -> None:
        """End the process; what it is reading is finished by the kernel.

        One that a server keeps in a system call is left to itself: it ends when that answers.
        """
        self.socket.close()
        try:
            self.popen.wait(5)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(5)

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
        """Send an order; that the process has died is found when its answers are received."""
        message = ORDER.pack(operation, argument, number, start, length) + data
        with suppress(OSError):  # one that has died is found by the receiver
            if fd < 0:
                self.socket.send(message)
            else:
                socket.send_fds(self.socket, [message], [fd])


def move(process: WorkerProcess, cgroup: Path) -> int:
    """Move a worker process into a memory cgroup, which is then charged for what it reads.

    Args:
        process: process id of the worker.
        cgroup: the cgroup's directory.

    Returns:
        0, or the errno with which the kernel refuses: then the agent's cgroup is charged.
    """
    try:
        (cgroup / "cgroup.procs").write_text(str(process.popen.pid))
    except OSError as error:
        return error.errno or errno.EIO
    return 0
