# SPDX-License-Identifier: Apache-2.0
"""The processes that loads belong to: when they end, and how long they waited for the disk.

Ends come from the kernel's process events (netlink proc connector, through pyroute2) where it
has them and this process may listen, and otherwise from a descriptor of each process (pidfd,
Linux 5.3).  A pidfd is held in both cases: it says which process is meant when numbers are
reused, and whether an event was missed.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.ipc.peer import has_ended
from pagecache_bpf.kernel import pid_namespace
from pagecache_bpf.kernel.classic_bpf import EQUAL, LOAD, RETURN, FilterProgram
from pagecache_bpf.kernel.kernelfs import LIVE

CONNECTOR, PIDFD = "connector", "pidfd"

_log = logging.getLogger(__name__)
_SO_ATTACH_FILTER = 26  # include/uapi/asm-generic/socket.h
_WHAT_OFFSET = 36  # struct nlmsghdr, struct cn_msg; then proc_event.what
_NETLINK_CONNECTOR = 11  # include/uapi/linux/netlink.h
_NLMSG_HDRLEN = 16  # of struct nlmsghdr
_EXIT = 0x80000000  # PROC_EVENT_EXIT in include/uapi/linux/cn_proc.h


class Process:
    """A process that lives, or has lived.  Raises OSError when there is none of that number."""

    def __init__(self, pid: int, pidfd: int | None = None) -> None:
        """Hold a process.

        Args:
            pid: its number.
            pidfd: a descriptor of it, which is this object's now; None: one is taken.
        """
        self.pid = pid
        self._fd = os.pidfd_open(pid) if pidfd is None else pidfd

    @property
    def alive(self) -> bool:
        """Return whether it has not ended."""
        return self._fd >= 0 and not has_ended(self._fd)

    def fileno(self) -> int:
        """Return its descriptor, which is readable when it has ended."""
        return self._fd

    def close(self) -> None:
        """Forget it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ProcessWatch:
    """Tells when a process that is watched has ended.  Its thread runs while anything is watched.

    Args:
        ended: called with the number of a process, in the thread of the watch.
        connector: whether to ask for the kernel's process events; without them a descriptor of each
            process is polled.

    Attributes:
        how: CONNECTOR or PIDFD.
        why: why not the connector; empty if it is.
    """

    def __init__(self, ended: Callable[[int], None], connector: bool = True) -> None:
        self._ended = ended
        self._lock = threading.Lock()
        self._processes: dict[int, tuple[Process, int]] = {}  # with how often it is watched
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stop = False
        self._thread: threading.Thread | None = None
        self._events: ExitEvents | None = None
        self.how, self.why = PIDFD, "it was not asked for"
        if connector:
            try:
                self._events = ExitEvents()
                self.how, self.why = CONNECTOR, ""
            except UnsupportedError as error:
                self.why = error.why

    def add(self, pid: int, pidfd: int | None = None) -> bool:
        """Watch a process.

        Args:
            pid: its number.
            pidfd: a descriptor of it, which is this object's now; None: one is taken.

        Returns:
            False if it has ended already.
        """
        try:
            added = Process(pid, pidfd)
        except OSError:
            return False
        with self._lock:
            if pid in self._processes:
                added.close()
                process, times = self._processes[pid]
                if process.alive:
                    self._processes[pid] = (process, times + 1)
                    return True
                return False
            self._processes[pid] = (added, 1)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="processes", daemon=True)
                self._thread.start()
        self._wake()
        return True

    def remove(self, pid: int) -> None:
        """Watch a process no more, or once less.

        Args:
            pid: its number.
        """
        with self._lock:
            process, times = self._processes.get(pid, (None, 0))
            if process is None:
                return
            if times > 1:
                self._processes[pid] = (process, times - 1)
                return
            del self._processes[pid]
            process.close()
        self._wake()

    def close(self) -> None:
        """End the thread."""
        self._stop = True
        self._wake()
        if self._thread is not None:
            self._thread.join(5)
        for process, _ in self._processes.values():
            process.close()
        os.close(self._wake_write)
        os.close(self._wake_read)
        self._wake_write = self._wake_read = -1
        if self._events is not None:
            self._events.close()

    def _wake(self) -> None:
        with suppress(OSError):  # it is full, or this is over
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        while not self._stop:
            poller = select.poll()
            poller.register(self._wake_read, select.POLLIN)
            if self._events is not None:
                poller.register(self._events.fileno(), select.POLLIN)
            else:
                with self._lock:
                    for process, _ in self._processes.values():
                        poller.register(process.fileno(), select.POLLIN)
            ready = {fd for fd, _ in poller.poll()}
            if self._wake_read in ready:
                with suppress(BlockingIOError):
                    while os.read(self._wake_read, 4096):
                        pass
            if self._events is not None:
                if self._events.fileno() in ready:
                    self._report(self._events.ended())
            else:
                self._report(None)

    def _report(self, pids: set[int] | None) -> None:
        """Tell of those among these that have ended; None: look at every one."""
        with self._lock:
            # The kernel tells of each thread; the pidfd knows when the last one is gone, which
            # is before the event (do_exit() in kernel/exit.c).
            ended = [
                pid
                for pid, (process, _) in self._processes.items()
                if (pids is None or pid in pids) and not process.alive
            ]
        for pid in ended:
            with self._lock:
                process, _ = self._processes.pop(pid, (None, 0))
            if process is not None:
                process.close()
                self._ended(pid)


def _ask_the_connector(what: str) -> None:
    """Send the kernel's connector a message that it drops: only the first network namespace has it.

    pyroute2 would find that out, too, and have asyncio log each step of its failure.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_CONNECTOR) as probe:
            probe.sendto(bytes(_NLMSG_HDRLEN), (0, 0))
    except ConnectionRefusedError as error:
        raise UnsupportedError(what, "this is not the first network namespace") from error
    except OSError as error:
        raise UnsupportedError(what, str(error)) from error


class ExitEvents:
    """The kernel's process events, ends only.

    Raises:
        UnsupportedError: they cannot be had; the error says why.
    """

    def __init__(self) -> None:
        what = "process events cannot be had"
        if not pid_namespace.is_first():
            raise UnsupportedError(what, "this is not the first PID namespace")
        _ask_the_connector(what)
        try:
            from pyroute2.netlink.connector.cn_proc import ProcEventSocket
        except ImportError as error:
            raise UnsupportedError(what, f"pyroute2 is missing ({error})") from error
        try:
            self._netlink = ProcEventSocket()
        except Exception as error:
            raise UnsupportedError(what, str(error)) from error
        try:
            self._netlink.bind()
            self._loop = self._netlink.asyncore.event_loop  # of this thread
            self._netlink.control(listen=True)
            # From here on it is read in another thread, which pyroute2's own calls are not for.
            self._socket = socket.socket(fileno=os.dup(self._netlink.fileno()))
        except Exception as error:
            self._netlink.close()
            raise UnsupportedError(what, str(error)) from error
        self._socket.setblocking(False)
        _only_ends(self._socket)

    def fileno(self) -> int:
        """Return its descriptor, which is readable when there is an event."""
        return self._socket.fileno()

    def ended(self) -> set[int] | None:
        """Read which processes a thread of has ended, of those the newest.

        Returns:
            Their numbers; None: some were lost.
        """
        found: set[int] = set()
        try:
            while True:
                for event in self._netlink.marshal.parse(self._socket.recv(1 << 16)):
                    found.add(int(event.get("process_tgid") or 0))
        except BlockingIOError:
            return found
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                _log.warning("process events failed: %s", error)
            return None

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        with suppress(Exception):
            self._netlink.close()
            # pyroute2 leaves it to the garbage collector, which may close its sockets before it.
            self._loop.close()


def _only_ends(sock: socket.socket) -> None:
    """Have the kernel drop every other event: the forks of a busy machine must not wake us."""
    program = FilterProgram.of(
        [
            (LOAD, 0, 0, _WHAT_OFFSET),  # what happened: taken as in network order
            (EQUAL, 0, 1, socket.ntohl(_EXIT)),  # is it the end of a thread?
            (RETURN, 0, 0, 0xFFFFFFFF),  # take all of the message
            (RETURN, 0, 0, 0),  # take nothing
        ]
    )
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))


class DiskDelays:
    """Time that processes waited for block devices, from the kernel's delay accounting.

    pyroute2 has a socket and an event loop for each thread that asks, which nobody closes when the
    thread ends.  So one thread asks for all, and closes what it has at the end.

    why: why it cannot be known; empty if it can.
    """

    def __init__(self) -> None:
        self.why = ""
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="delays")
        self._netlink: Any = None
        try:
            self._asker.submit(self._open).result()
        except Exception as error:
            self.why = f"delay accounting cannot be asked for ({error})"
        # Since 5.14 (commit e4042ad49235) it is off unless switched on; 0 would be a lie.
        if not self.why and (LIVE.read("/proc/sys/kernel/task_delayacct") or "1") == "0":
            self.why = "delay accounting is off (kernel.task_delayacct is 0)"

    def _open(self) -> None:
        from pyroute2.netlink.taskstats import TaskStats

        self._netlink = TaskStats()
        self._netlink.bind()

    def of(self, pid: int) -> int | None:
        """Return how long the threads of a process have waited for block devices.

        Args:
            pid: the process.

        Returns:
            Nanoseconds; None: it is not known, or there is no such process.
        """
        if self.why:
            return None
        try:
            return self._asker.submit(self._ask, pid).result()
        except Exception as error:  # pyroute2 raises classes of its own
            _log.debug("no delays of process %d: %s", pid, error)
            return None

    def _ask(self, pid: int) -> int:
        from pyroute2.netlink import NLM_F_REQUEST
        from pyroute2.netlink.taskstats import TASKSTATS_CMD_GET, tcmd

        request = tcmd()
        request["cmd"], request["version"] = TASKSTATS_CMD_GET, 1
        request["attrs"].append(["TASKSTATS_CMD_ATTR_TGID", pid])
        link = self._netlink
        (answer, *_) = link.nlm_request(request, link.prid, msg_flags=NLM_F_REQUEST)
        stats = answer.get_attr("TASKSTATS_TYPE_AGGR_TGID").get_attr("TASKSTATS_TYPE_STATS")
        return int(stats["blkio_delay_total"])

    def close(self) -> None:
        """Hang up."""
        with suppress(Exception):
            self._asker.submit(self._close).result()
        self._asker.shutdown()

    def _close(self) -> None:
        if self._netlink is not None:
            loop = self._netlink.asyncore.event_loop
            try:
                self._netlink.close()
            finally:
                loop.close()
