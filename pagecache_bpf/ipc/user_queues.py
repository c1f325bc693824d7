# SPDX-License-Identifier: Apache-2.0
"""Worker threads, shared out so that one user cannot take them all.

A system call on somebody's file may take for ever (a file server that does not answer), so each
user has a queue of work of which a few pieces run at a time; others wait in that queue only.
Reserved keys (root's) have threads of their own, which exist from the start.

All threads share one interpreter, so CPU time is shared out, too: together, users may take a
quarter of one CPU, each an equal part.  Several users together take no more than a twentieth of
the machine, so that on few CPUs, too, a crowd leaves others' loads theirs.  A user who has taken
more than its part, and what it has saved up, has to wait for a while; waiting for a disk or
another process costs nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable

from pagecache_bpf.errors import PagecacheError

#: Threads at a time of one user, and of all.
THREADS_PER_USER = 4
TOTAL = 64
_IDLE_SECONDS = 5.0
#: Of one processor, for all users together, and of the whole machine, for more than one; seconds
#: that a user saves up, and the longest that it rests.
SHARE = 0.25
MACHINE_SHARE = 0.05
SAVED_SECONDS = 0.5
REST_SECONDS = 2.0

_log = logging.getLogger(__name__)
Work = Callable[[], None]


class UserQueues:
    """Runs work in the order of each user's queue.

    Threads are made when there is work, and daemons: one that hangs does not keep the process from
    ending.

    Attributes:
        start_failures: how many threads could not be started so far.
    """

    def __init__(
        self, per_user: int = THREADS_PER_USER, total: int = TOTAL, processors: int = 0
    ) -> None:
        """Make empty queues.

        Args:
            per_user: threads that one key may have at a time.
            total: threads of all keys that are not reserved.
            processors: how many CPUs there are; 0: as many as this process may run on.
        """
        self.start_failures = 0  # threads that could not be started
        self._per_user, self._total = per_user, total
        self._processors = processors or len(os.sched_getaffinity(0))
        self._waiting: dict[Hashable, deque[Work]] = {}
        self._running: dict[Hashable, int] = {}
        self._reserved: dict[Hashable, threading.Condition] = {}
        self._threads = self._idle = 0
        self._allowances: dict[Hashable, tuple[float, float]] = {}  # seconds left, and when
        self._lock = threading.Lock()
        self._idlers: list[threading.Condition] = []  # of threads that wait, the last one last
        self._done = threading.Condition(self._lock)  # there is nothing to do any more
        self._keeper = False  # whether an idle thread waits for the end of somebody's rest

    def reserve(self, key: Hashable) -> None:
        """Start a thread that works for one key alone, whatever the others do.

        Args:
            key: the key.

        Raises:
            RuntimeError: it cannot be started.
        """
        with self._lock:
            self._reserved[key] = threading.Condition(self._lock)
        threading.Thread(
            target=self._serve_reserved, args=(key,), name=f"queue-{key}", daemon=True
        ).start()

    def submit(self, key: Hashable, work: Work, must_run: bool = False) -> None:
        """Run something in a thread when it is its turn; what it raises is logged.

        Args:
            key: whose queue it goes to.
            work: is called without arguments.
            must_run: keep it in the queue where no thread can be started now: it runs when one
                is free, or at a later retry().

        Raises:
            PagecacheError: no thread can be started for it; it is not run.
        """
        with self._lock:
            waiting = self._waiting.setdefault(key, deque())
            waiting.append(work)
            if key in self._reserved:
                self._reserved[key].notify()
                return
            error = self._grow()
            if error is None or must_run or self._idle:
                self._wake()
                return
            waiting.pop()
            if not waiting:
                del self._waiting[key]
        raise PagecacheError(
            "the request was not begun",
            f"no thread can be started for it: {error}",
            "Try again later; the controller's limit of tasks (TasksMax) is reached",
        )

    def retry(self) -> None:
        """Start a thread for work that was kept when none could be started."""
        with self._lock:
            if self._general() and not self._idle and not self._threads:
                self._grow()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing runs or waits.

        Args:
            seconds: how long at most.

        Returns:
            Whether that was so in time.
        """
        with self._done:
            return self._done.wait_for(
                lambda: not self._running and not any(self._waiting.values()), seconds
            )

    def waiting(self) -> int:
        """Count the work that waits for a thread.

        Returns:
            Pieces of work in all queues.
        """
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def running(self) -> int:
        """Count the work that is being done.

        Returns:
            Pieces of work of all users, reserved ones included.
        """
        with self._lock:
            return sum(self._running.values())

    def _general(self) -> int:
        """Count the work that waits for a thread which is not reserved."""
        return sum(len(work) for key, work in self._waiting.items() if key not in self._reserved)

    def _runnable(self, now: float) -> int:
        """Count the work that a thread could begin now."""
        return sum(
            min(len(work), self._per_user - self._running.get(key, 0))
            for key, work in self._waiting.items()
            if key not in self._reserved and self._rest(key, now) <= 0
        )

    def _grow(self) -> Exception | None:
        """Start a thread if one is missing; return the error where that failed.  Under the lock."""
        if self._threads >= self._total:
            return None
        # A thread that is idle may have been woken for other work already.
        if self._threads and self._runnable(time.monotonic()) <= self._idle:
            return None
        thread = threading.Thread(target=self._serve, name="queue", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self.start_failures += 1
            return error
        self._threads += 1
        return None

    def _next(self) -> tuple[Hashable, Work] | None:
        """Take work of the first user that may run more; that user goes to the end of the line."""
        now = time.monotonic()
        for key, waiting in list(self._waiting.items()):
            if (
                key not in self._reserved
                and self._running.get(key, 0) < self._per_user
                and self._rest(key, now) <= 0
            ):
                del self._waiting[key]
                return key, self._taken(key, waiting)
        return None

    def _rate(self) -> float:
        """Return how many seconds of CPU time a user may take in a second."""
        users = {*self._waiting, *self._running} - self._reserved.keys()
        if len(users) < 2:
            return SHARE
        return min(SHARE, MACHINE_SHARE * self._processors) / len(users)

    def _left(self, key: Hashable, now: float) -> float:
        """Return how many seconds of CPU time a user may take at once; below 0 it has to wait."""
        left, since = self._allowances.get(key, (SAVED_SECONDS, now))
        return min(SAVED_SECONDS, left + (now - since) * self._rate())

    def _rest(self, key: Hashable, now: float) -> float:
        """Return for how many seconds a user still has to wait; 0 or less: it has not."""
        if key not in self._allowances:
            return 0.0
        return -self._left(key, now) / self._rate()

    def _charge(self, key: Hashable, seconds: float) -> None:
        """Take the CPU time that work has cost off what its user may take.  Under the lock."""
        now = time.monotonic()
        left = max(self._left(key, now) - seconds, -REST_SECONDS * self._rate())
        self._allowances[key] = (left, now)
        if len(self._allowances) > 2 * self._total:
            full = [key for key in self._allowances if self._left(key, now) >= SAVED_SECONDS]
            for other in full:
                del self._allowances[other]

    def _pause(self) -> float:
        """Return how long an idle thread waits at most: until a user may run again, or for good."""
        now = time.monotonic()
        rests = [self._rest(key, now) for key in self._waiting if key not in self._reserved]
        return min([_IDLE_SECONDS, *(rest for rest in rests if rest > 0)])

    def _taken(self, key: Hashable, waiting: deque[Work]) -> Work:
        """Take the first piece of a queue, and put the queue behind the others."""
        work = waiting.popleft()
        if waiting:
            self._waiting[key] = waiting
        self._running[key] = self._running.get(key, 0) + 1
        return work

    def _serve(self) -> None:
        """Work for everybody, until there has been nothing to do for a while."""
        woken = threading.Condition(self._lock)
        while True:
            with self._lock:
                until = time.monotonic() + _IDLE_SECONDS
                while (taken := self._next()) is None:
                    self._wait(woken)
                    if time.monotonic() >= until and not self._general():
                        self._threads -= 1
                        return
                if self._idle and not self._keeper and self._general():
                    self._wake()  # somebody has to see to those who rest
            self._run(*taken)

    def _wait(self, woken: threading.Condition) -> None:
        """Wait for something to do.  One thread sees to those who rest: all would be a crowd."""
        self._idle += 1
        self._idlers.append(woken)
        if self._keeper:
            woken.wait(_IDLE_SECONDS)
        else:
            self._keeper = True
            woken.wait(self._pause())
            self._keeper = False
        if woken in self._idlers:  # nobody has woken it
            self._idlers.remove(woken)
        self._idle -= 1

    def _wake(self) -> None:
        """Wake the thread that has been idle for the shortest time: the others may end."""
        if self._idlers:
            self._idlers.pop().notify()

    def _serve_reserved(self, key: Hashable) -> None:
        """Work for one key, for ever."""
        while True:
            with self._lock:
                while not (waiting := self._waiting.pop(key, None)):
                    self._reserved[key].wait()
                work = self._taken(key, waiting)
            self._run(key, work)

    def _run(self, key: Hashable, work: Work) -> None:
        """Do a piece of work and charge its user with the CPU time; what it raises is logged."""
        begun = time.thread_time()
        try:
            work()
        except Exception:
            _log.exception("work for %s failed", key)
        with self._lock:
            if key not in self._reserved:
                self._charge(key, time.thread_time() - begun)
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
            # What can run now is taken by this thread; a reserved one does not look for others'.
            if not self._running and not any(self._waiting.values()):
                self._done.notify_all()

    def __repr__(self) -> str:
        return f"<UserQueues: {self._threads} threads, running {dict(self._running)}>"
