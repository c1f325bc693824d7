# SPDX-License-Identifier: Apache-2.0
"""Belady's optimum: what a cache could hit at best that knew the future."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """Hits of the best schedule: their sum of weights, and how many there are."""

    hit_weight: int
    hits: int


def optimum(
    pages: Sequence[int],
    capacity: int,
    weights: Sequence[int] | None = None,
    watch: Callable[[int, bool, int | None], None] | None = None,
) -> Best:
    """Replay page numbers through a cache that evicts what is wanted last: no policy has more hits.

    A page that is wanted enters the cache, as the kernel's read() has it.  Takes O(n log n) time.

    Args:
        pages: numbers of the pages that are read, in order.
        capacity: pages that the cache holds.
        weights: what a hit of each access is worth; None: 1.  The schedule maximizes hits, not
            their weights.
        watch: called with each access's number, whether it was a hit, and the page that went for
            it, None if none did.

    Returns:
        The hits and the sum of their weights.

    Source:
        L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems
        Journal 5(2), 1966.
    """
    total = len(pages)
    next_use, seen = array("q", bytes(8 * total)), dict[int, int]()
    for at in range(total - 1, -1, -1):
        next_use[at] = seen.get(pages[at], total + pages[at])
        seen[pages[at]] = at
    resident: dict[int, int] = {}  # page: when it is wanted next
    farthest: list[tuple[int, int]] = []  # stale entries are left behind and skipped
    weight = hits = 0
    for at, page in enumerate(pages):
        gone: int | None = None
        hit = page in resident
        if hit:
            hits += 1
            weight += weights[at] if weights is not None else 1
        elif capacity <= 0:
            continue
        elif len(resident) >= capacity:
            while True:
                until, victim = heapq.heappop(farthest)
                if resident.get(victim) == -until:
                    del resident[victim]
                    gone = victim
                    break
        if watch is not None:
            watch(at, hit, gone)
        resident[page] = next_use[at]
        heapq.heappush(farthest, (-next_use[at], page))
    return Best(weight, hits)
