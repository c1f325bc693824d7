# SPDX-License-Identifier: Apache-2.0
"""How much CPU time each of many may take: so much at once, and so much more with the time.

It measures nothing and stops nobody: whoever works for a key is charged, and asks before more work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable


class CpuAllowance:
    """Seconds of CPU time that are left to each key."""

    def __init__(self, saved: float, rate: float) -> None:
        """Make one that nobody has taken anything of.

        Args:
            saved: seconds that a key may take at once.
            rate: seconds that it gets back in a second.
        """
        self._saved, self._rate = saved, rate
        self._lock = threading.Lock()
        self._left: dict[Hashable, tuple[float, float]] = {}  # seconds, and when that was so

    def charge(self, key: Hashable, seconds: float) -> None:
        """Take note of what work has cost, however much is left.

        Args:
            key: whom it was for.
            seconds: of CPU time.
        """
        now = time.monotonic()
        with self._lock:
            self._left[key] = (self._now(key, now) - seconds, now)
            # Who has everything again needs no place.
            self._left = {key: was for key, was in self._left.items() if self._full_in(was, now)}

    def rest(self, key: Hashable) -> float:
        """Tell how long a key has to wait before it may take more.

        Args:
            key: whom it is about.

        Returns:
            Seconds; 0: it need not.
        """
        with self._lock:
            return max(0.0, -self._now(key, time.monotonic()) / self._rate)

    def _now(self, key: Hashable, now: float) -> float:
        """Return the seconds that are left; below 0 they have been taken in advance."""
        left, since = self._left.get(key, (self._saved, now))
        return min(self._saved, left + (now - since) * self._rate)

    def _full_in(self, was: tuple[float, float], now: float) -> bool:
        """Tell whether a key had not everything back by now."""
        left, since = was
        return left + (now - since) * self._rate < self._saved
