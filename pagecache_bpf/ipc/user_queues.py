# SPDX-License-Identifier: Apache-2.0
"""Worker threads, shared out so that one user cannot take them all.

A system call on somebody's file may take for ever (a FUSE server that does not answer), so each
key, a user, has a queue with room for a few at a time; others wait in that queue only.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress

#: Threads at a time of one queue, and of all.
THREADS_PER_USER = 4
TOTAL = 64
_IDLE_SECONDS = 5.0

_log = logging.getLogger(__name__)
Work = Callable[[], None]


class UserQueues:
    """Runs work in the order of each queue.  Threads are made when there is work, and daemons:
    one that hangs does not keep the process from ending.
    """

    def __init__(self, per_user: int = THREADS_PER_USER, total: int = TOTAL) -> None:
        self._per_user, self._total = per_user, total
        self._waiting: dict[Hashable, deque[Work]] = {}
        self._running: dict[Hashable, int] = {}
        self._limits: dict[Hashable, int] = {}
        self._threads = self._idle = 0
        self._wake = threading.Condition()

    def limit(self, queue: Hashable, threads: int) -> None:
        """Give one queue another number of threads."""
        self._limits[queue] = threads

    def submit(self, queue: Hashable, work: Work) -> None:
        """Run it in a thread when it is its turn.  What it raises is logged."""
        with self._wake:
            self._waiting.setdefault(queue, deque()).append(work)
            # One that is idle may have been woken for other work already.
            waiting = sum(len(queue) for queue in self._waiting.values())
            if waiting > self._idle and self._threads < self._total:
                self._threads += 1
                threading.Thread(target=self._work, name="queue", daemon=True).start()
            else:
                self._wake.notify()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing runs or waits, for so long at most."""
        with self._wake:
            return self._wake.wait_for(
                lambda: not self._running and not any(self._waiting.values()), seconds
            )

    def _next(self) -> tuple[Hashable, Work] | None:
        """Work of a queue that has room; the queue goes to the end of the line."""
        for key, waiting in list(self._waiting.items()):
            room = self._limits.get(key, self._per_user)
            if waiting and self._running.get(key, 0) < room:
                work = waiting.popleft()
                del self._waiting[key]
                if waiting:
                    self._waiting[key] = waiting
                self._running[key] = self._running.get(key, 0) + 1
                return key, work
        return None

    def _work(self) -> None:
        while True:
            with self._wake:
                while (taken := self._next()) is None:
                    self._idle += 1
                    woken = self._wake.wait(_IDLE_SECONDS)
                    self._idle -= 1
                    if not woken and not any(self._waiting.values()):
                        self._threads -= 1
                        return
            queue, work = taken
            try:
                work()
            except Exception:
                _log.exception("work of queue %s failed", queue)
            with self._wake:
                self._running[queue] -= 1
                if not self._running[queue]:
                    del self._running[queue]
                self._wake.notify_all()

    def __repr__(self) -> str:
        with suppress(RuntimeError):
            return f"<UserQueues: {self._threads} threads, running {self._running}>"
        return "<UserQueues>"
