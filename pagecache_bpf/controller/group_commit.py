# SPDX-License-Identifier: Apache-2.0
"""Has something written down after changes: once for all that came while it was being written.

Whoever changes something waits until it is written.  Where many change something at once, one of
them writes for all, so that nobody waits for more than two writings.  Changes that need not be
written at once wait until writing takes a small part of the time only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Of the time, for what is written later.
SHARE = 0.05


class GroupCommit:
    """Writes after changes.  Its methods may be called from any thread, holding no lock."""

    def __init__(self, write: Callable[[], None]) -> None:
        """Begin with nothing to write.

        Args:
            write: writes everything down as it is now; called by one thread at a time.
        """
        self._write = write
        self._done = threading.Condition()
        self._wanted = self._written = 0
        self._writing = False
        self._late = False  # there are changes that nobody waits for
        self._not_before = 0.0

    def now(self) -> None:
        """Have what was changed written down, and wait for that."""
        with self._done:
            self._wanted += 1
            mine = self._wanted
            self._done.wait_for(lambda: self._written >= mine or not self._writing)
            if self._written >= mine:
                return
            self._writing, self._late = True, False
            covered = self._wanted
        begun = time.monotonic()
        try:
            self._write()
        finally:
            with self._done:
                self._writing = False
                self._written = covered
                now = time.monotonic()
                self._not_before = now + (now - begun) / SHARE
                self._done.notify_all()

    def soon(self) -> None:
        """Have what was changed written down: at once if it has been a while, or by due()."""
        with self._done:
            self._late = True
        if self.due(time.monotonic()):
            self.now()

    def due(self, now: float) -> bool:
        """Tell whether changes wait that may be written now.

        Args:
            now: seconds of the monotonic clock.

        Returns:
            False if none wait, or the last write was too short ago.
        """
        with self._done:
            return self._late and now >= self._not_before
