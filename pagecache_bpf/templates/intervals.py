# SPDX-License-Identifier: Apache-2.0
"""Disjoint intervals: what has been seen of a file."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Intervals:
    """Disjoint intervals, sorted."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Add one; what of it is new."""
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
