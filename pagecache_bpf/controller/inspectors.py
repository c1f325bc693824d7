# SPDX-License-Identifier: Apache-2.0
"""Has a client's files looked at by a process of the client's user; see file_inspector.

Each user has at most one such process, which does one job after the other.  It is bounded in
time, ends when the client hangs up, and may be lost at any moment: then the job has failed and
the next one gets another process.  What it answers is checked here like anything of a stranger's.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pagecache_bpf.controller import seccomp
from pagecache_bpf.controller.cpu_allowance import CpuAllowance
from pagecache_bpf.controller.file_inspector import FDS_AT_ONCE
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc import wire

#: Processes of all users together; a job waits for its turn, so long at most.
PROCESSES = 16
TURN_SECONDS = 20.0
#: From the beginning of a job to the end of its answer.
JOB_SECONDS = 30.0
#: A job that takes more of a processor goes on where nobody else wants one, and so do later ones
#: of its user, and of a user whose process was lost, for a while.
EAGER_CPU_SECONDS = 0.2
_SLOW_SECONDS = 60.0
#: CPU time that the jobs of one user may take at once, and of each second that follows.  One that
#: loses its process is charged with more than starting the next one takes (a quarter second).
SAVED_CPU_SECONDS = 3.0
CPU_SHARE = 0.02
_LOST_CPU_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_IDLE_SECONDS = 10.0
_SCHED_CLOCK = 2  # of a process: CPUCLOCK_SCHED of include/linux/posix-timers.h
_ANSWER_BYTES = 16 << 20
_DATA_BYTES = 256 << 20
_START = (
    "import sys; sys.path[:] = sys.argv.pop().split('\\n'); "
    "from pagecache_bpf.controller.file_inspector import main; sys.exit(main())"
)

Owner = tuple[int, bool]
_log = logging.getLogger(__name__)


class _Lost(Exception):
    """The process is not there any more, or was ended; its text says why."""


class _Process:
    """One inspector; it belongs to nobody until it is told whose it is."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _START, str(theirs.fileno()), "\n".join(sys.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    # numpy's libraries would start a thread for each CPU.
                    env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
                )
            except BaseException:
                ours.close()
                raise
        self.socket = ours
        self.busy = threading.Lock()  # one job at a time
        self.used = time.monotonic()
        self.is_slow = False  # it runs where nobody else wants the processor
        self._clock = (~self.process.pid << 3) | _SCHED_CLOCK
        self._begun = self._bound = 0.0  # seconds of its processor time: at a job, to slow down at
        with suppress(OSError):
            self.slow_down()  # nobody waits for it yet

    def send(self, job: dict[str, Any], fds: Sequence[int], until: float) -> None:
        """Give it a job.  Raises OSError."""
        self._begun = time.clock_gettime(self._clock)
        self._bound = self._begun + EAGER_CPU_SECONDS
        text = json.dumps(job).encode()
        self.socket.settimeout(max(0.01, until - time.monotonic()))
        self.socket.sendall(len(text).to_bytes(4, "little") + len(fds).to_bytes(4, "little"))
        for first in range(0, len(fds), FDS_AT_ONCE):
            socket.send_fds(self.socket, [b"f"], list(fds[first : first + FDS_AT_ONCE]))
        self.socket.sendall(text)

    def receive(self, size: int, until: float, wanted: Callable[[], bool]) -> bytes:
        """Take so many bytes of its answer.  Raises _Lost."""
        data = bytearray()
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        while len(data) < size:
            if time.monotonic() >= until:
                raise _Lost(f"it took longer than {JOB_SECONDS:.0f} s")
            if not wanted():
                raise _Lost("the client has hung up")
            if not poller.poll(_LOOK_SECONDS * 1000):
                if not self.is_slow and time.clock_gettime(self._clock) > self._bound:
                    self.slow_down()
                continue
            piece = self.socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise _Lost(self._ending())
            data += piece
        return bytes(data)

    def cost(self) -> float:
        """Return the CPU time that the last job has taken, in seconds."""
        with suppress(OSError):  # it was ended, and is not known any more
            return time.clock_gettime(self._clock) - self._begun
        return 0.0

    def slow_down(self) -> None:
        """Have it run only where nobody else wants the processor.  Raises OSError."""
        os.sched_setscheduler(self.process.pid, os.SCHED_IDLE, os.sched_param(0))
        self.is_slow = True

    def hurry(self) -> None:
        """Give the process normal priority: somebody waits for its answer.  Raises OSError."""
        os.sched_setscheduler(self.process.pid, os.SCHED_OTHER, os.sched_param(0))
        self.is_slow = False

    def _ending(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            if -self.process.wait(5) == signal.SIGXCPU:
                return "it took too much time of the processor"
        return "its process has ended"

    def close(self) -> None:
        """End it, whatever it does."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


class Inspectors:
    """The processes of all users.

    Attributes:
        started: processes that were started so far.
        lost: those that ended in the middle of a job, or had to be ended, by reason.
        filtered: whether the kernel keeps system calls from them that reading takes none of.
    """

    def __init__(self, started: Callable[[int], None] = lambda pid: None) -> None:
        """Start one process, so that the first job finds one.

        Args:
            started: is told each process; what it reads is no access of a client's.
        """
        self.started = 0
        self.lost: Counter[str] = Counter()
        self.filtered = seccomp.available()
        if not self.filtered:
            _log.warning(
                "no filter of system calls (seccomp) for the processes that read files of clients: "
                "their user, their lack of capabilities and their limits are all that bounds them"
            )
        self._tell_started = started
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._of: dict[Owner, _Process] = {}
        self._allowance = CpuAllowance(SAVED_CPU_SECONDS, CPU_SHARE)
        self._slow: dict[Owner, float] = {}  # users of jobs that took long, and until when
        self._spare: _Process | None = None
        self._spare_is_wanted = True
        self._closed = False

    def prepare(self) -> None:
        """Start a process that waits for the next user; where it cannot be, jobs try again."""
        with self._lock:
            if self._spare is None and not self._closed:
                with suppress(OSError):
                    self._spare = self._start()

    def run(
        self,
        owner: Owner,
        gid: int,
        job: str,
        fds: Sequence[int],
        wanted: Callable[[], bool] = lambda: True,
        **arguments: Any,
    ) -> tuple[dict[str, Any], bytes]:
        """Have a job done.

        Args:
            owner: whose files these are; its user.
            gid: the user's group.
            job: one of file_inspector.JOBS.
            fds: the files; they stay the caller's.
            wanted: whether somebody still waits for the answer.
            **arguments: of the job.

        Returns:
            The answer, and the bytes that follow it.

        Raises:
            PagecacheError: what the job tells, or that it could not be done.
        """
        what = "the files were not looked at"
        process = self._await_turn(owner, gid)
        try:
            self._check_allowance(owner)  # as earlier jobs have left it
            if not wanted():
                raise PagecacheError(what, "the client has hung up")
            until = time.monotonic() + JOB_SECONDS
            process.send({"job": job, **arguments}, fds, until)
            head = process.receive(8, until, wanted)
            sizes = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
            if sizes[0] > _ANSWER_BYTES or sizes[1] > _DATA_BYTES:
                raise _Lost("its answer is too long")
            facts = json.loads(process.receive(sizes[0], until, wanted))
            data = process.receive(sizes[1], until, wanted)
            if not isinstance(facts, dict):
                raise _Lost("its answer is none")
            process.used = time.monotonic()
            self._allowance.charge(owner, process.cost())
        except (_Lost, OSError, ValueError, RecursionError) as error:
            # A few fixed texts: they are labels of a metric.
            why = str(error) if isinstance(error, _Lost) else "its process has ended"
            self._allowance.charge(owner, _LOST_CPU_SECONDS)
            self._allowance.charge(owner, process.cost())
            self._lose(owner, process, why)
            raise PagecacheError(what, why) from None
        finally:
            if process.is_slow and time.monotonic() >= self._slow.get(owner, 0.0):
                self._slow[owner] = time.monotonic() + _SLOW_SECONDS
            process.busy.release()
        if "error" in facts:
            try:
                told = wire.told_error(facts["error"], most=500)
            except ValueError as wrong:
                told = PagecacheError("the files were not looked at", str(wrong))
            raise told
        return facts, data

    def sweep(self) -> None:
        """End the processes that have had nothing to do for a while, and see to a spare one."""
        now = time.monotonic()
        with self._lock:
            idle = [
                (owner, process)
                for owner, process in self._of.items()
                if now > process.used + _IDLE_SECONDS and not process.busy.locked()
            ]
            for owner, _ in idle:
                del self._of[owner]
            self._slow = {owner: until for owner, until in self._slow.items() if now < until}
            self._ended.notify_all()
        for _, process in idle:
            process.close()
        self.prepare()

    def count(self) -> int:
        """Return how many processes there are."""
        with self._lock:
            return len(self._of) + (self._spare is not None)

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            over = [*self._of.values(), *([self._spare] if self._spare else [])]
            self._of, self._spare = {}, None
        for process in over:
            process.close()

    def _start(self) -> _Process:
        process = _Process()
        self.started += 1
        self._tell_started(process.process.pid)
        return process

    def _await_turn(self, owner: Owner, gid: int) -> _Process:
        """Wait for a user's turn; return the process, locked.  Raises PagecacheError."""
        until = time.monotonic() + TURN_SECONDS
        while True:
            self._check_allowance(owner)
            process = self._process(owner, gid)
            if not process.busy.acquire(timeout=max(0.0, until - time.monotonic())):
                raise PagecacheError(
                    "the files were not looked at",
                    "an earlier request of this user takes too long",
                )
            with self._lock:
                if self._of.get(owner) is process:
                    return process
            process.busy.release()  # an earlier job has cost it its life

    def _process(self, owner: Owner, gid: int) -> _Process:
        """Return a user's process, started if needed.  Raises PagecacheError if it cannot be."""
        what = "the files were not looked at"
        with self._lock:
            known = self._of.get(owner)
            if known is not None and known.process.poll() is None:
                return known
            self._of.pop(owner, None)
            if not self._ended.wait_for(lambda: len(self._of) < PROCESSES, TURN_SECONDS):
                raise PagecacheError(what, f"those of {PROCESSES} other users are, at this moment")
            try:
                spare, self._spare = self._spare, None
                if spare is not None and spare.process.poll() is not None:  # it was killed
                    spare.close()
                    spare = None
                process = spare or self._start()
                uid = owner[0]
                if time.monotonic() >= self._slow.get(owner, 0.0):
                    process.hurry()
                process.send({"uid": uid, "gid": gid}, (), time.monotonic() + JOB_SECONDS)
            except OSError as error:
                self.lost["not started"] += 1
                raise PagecacheError(what, f"no process can be started: {error}") from error
            self._of[owner] = process
            return process

    def _check_allowance(self, owner: Owner) -> None:
        """Raise PagecacheError where jobs of a user have taken too much CPU time lately."""
        rest = self._allowance.rest(owner)
        if rest > 0 and not owner[1]:  # root pays for itself
            raise PagecacheError(
                "the files were not looked at",
                "earlier files of this user took too much time of the processor",
                f"Try again in {rest:.0f} s",
            )

    def _lose(self, owner: Owner, process: _Process, why: str) -> None:
        with self._lock:
            if self._of.get(owner) is process:
                del self._of[owner]
            self.lost[why] += 1
            self._slow[owner] = time.monotonic() + _SLOW_SECONDS
            self._ended.notify_all()
        _log.info("the process for files of user %d was ended: %s", owner[0], why)
        process.close()
