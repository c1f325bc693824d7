# SPDX-License-Identifier: Apache-2.0
"""Tells the service manager that the controller is alive, as long as it really serves.

That the loop turns proves nothing: a lock may be held for ever.  So a piece of work goes through
root's queue and through everybody's, takes the lock that requests take, and only what has come back
lately is told.  A request of root's may take its time, but not for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress

from pagecache_bpf.controller.systemd import notify, watchdog_seconds
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc.user_queues import UserQueues

#: A request of root's, like an attachment with many files, may take so long.
PATIENCE_SECONDS = 120.0


class Watchdog:
    """Looks whether requests are served, each time that the manager wants to hear of us."""

    def __init__(
        self,
        queues: UserQueues,
        root: Hashable,
        lock: threading.RLock,
        interval: float | None = None,
        tell: Callable[[str], object] = notify,
    ) -> None:
        """Begin with everything well.

        Args:
            queues: where requests are done.
            root: the key of root's queue.
            lock: what requests hold while they work.
            interval: seconds between two signs; None: as the manager says, if it does.
            tell: sends a line to the manager.
        """
        self._queues, self._root, self._lock, self._tell = queues, root, lock, tell
        self._interval = watchdog_seconds() if interval is None else interval
        self._told = time.monotonic()
        self._asked: dict[Hashable, float] = {}  # probes that have not come back, and since when
        self._keys = (root, "watchdog")

    def tick(self, now: float) -> None:
        """Do what is due; in the server's loop, and never waiting.

        Args:
            now: seconds of the monotonic clock.
        """
        if self._interval is None or now < self._told + self._interval:
            return
        self._told = now
        if self.healthy(now):
            self._tell("WATCHDOG=1")
        for key in self._keys:
            if key not in self._asked:
                self._asked[key] = now
                with suppress(PagecacheError):
                    self._queues.submit(key, lambda key=key: self._probe(key), must_run=True)  # type: ignore[misc]

    def healthy(self, now: float) -> bool:
        """Return whether every queue has served something lately.

        Args:
            now: seconds of the monotonic clock.

        Returns:
            False if one has not for PATIENCE_SECONDS.
        """
        return all(now - since < PATIENCE_SECONDS for since in list(self._asked.values()))

    def _probe(self, key: Hashable) -> None:
        with self._lock:
            self._asked.pop(key, None)
