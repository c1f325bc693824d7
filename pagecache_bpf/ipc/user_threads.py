# SPDX-License-Identifier: Apache-2.0
"""Worker threads, shared out so that one user cannot take them all.

A system call on somebody's file may take for ever (a FUSE server that does not answer), so each
key, a user, has a lane with room for a few at a time; others wait in that lane only.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress

#: Threads at a time of one lane, and of all.
PER_LANE = 4
TOTAL = 64
_IDLE_SECONDS = 5.0

_log = logging.getLogger(__name__)
Work = Callable[[], None]


class Lanes:
    """Runs work in the order of each lane.  Threads are made when there is work, and daemons:
    one that hangs does not keep the process from ending.
    """

    def __init__(self, per_lane: int = PER_LANE, total: int = TOTAL) -> None:
        self._per_lane, self._total = per_lane, total
        self._waiting: dict[Hashable, deque[Work]] = {}
        self._running: dict[Hashable, int] = {}
        self._limits: dict[Hashable, int] = {}
        self._threads = self._idle = 0
        self._wake = threading.Condition()

    def limit(self, lane: Hashable, threads: int) -> None:
        """Give one lane another number of threads."""
        self._limits[lane] = threads

    def submit(self, lane: Hashable, work: Work) -> None:
        """Run it in a thread when it is its turn.  What it raises is logged."""
        with self._wake:
            self._waiting.setdefault(lane, deque()).append(work)
            # One that is idle may have been woken for other work already.
            waiting = sum(len(queue) for queue in self._waiting.values())
            if waiting > self._idle and self._threads < self._total:
                self._threads += 1
                threading.Thread(target=self._work, name="lane", daemon=True).start()
            else:
                self._wake.notify()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing runs or waits, for so long at most."""
        with self._wake:
            return self._wake.wait_for(
                lambda: not self._running and not any(self._waiting.values()), seconds
            )

    def _next(self) -> tuple[Hashable, Work] | None:
        """Work of a lane that has room; the lane goes to the end of the line."""
        for lane, queue in list(self._waiting.items()):
            room = self._limits.get(lane, self._per_lane)
            if queue and self._running.get(lane, 0) < room:
                work = queue.popleft()
                del self._waiting[lane]
                if queue:
                    self._waiting[lane] = queue
                self._running[lane] = self._running.get(lane, 0) + 1
                return lane, work
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
            lane, work = taken
            try:
                work()
            except Exception:
                _log.exception("work of lane %s failed", lane)
            with self._wake:
                self._running[lane] -= 1
                if not self._running[lane]:
                    del self._running[lane]
                self._wake.notify_all()

    def __repr__(self) -> str:
        with suppress(RuntimeError):
            return f"<Lanes: {self._threads} threads, running {self._running}>"
        return "<Lanes>"
