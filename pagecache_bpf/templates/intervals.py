# SPDX-License-Identifier: Apache-2.0
"""Disjoint intervals of numbers, by which bytes or pages that were seen before are known.

It knows neither templates nor files.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Intervals:
    """A set of numbers, kept as disjoint intervals [start, end) in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Add an interval.

        Args:
            start: its first number.
            end: the number behind its last one.

        Returns:
            The parts of it that were not in the set before, in order.
        """
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        new, at = [], start
        for number in range(low, high):
            if at < self._starts[number]:
                new.append((at, self._starts[number]))
            at = max(at, self._ends[number])
        if at < end:
            new.append((at, end))
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        return new
