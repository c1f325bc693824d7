# SPDX-License-Identifier: Apache-2.0
"""mru, fifo and s3fifo: each does what its name says."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

import pytest

from tests.unit.policies.traces import MIB, Script, compare


def tree(script: Script, files: int = 400, kib: int = 96) -> list[str]:
    """Many small files, as a source tree has them."""
    names = []
    for number in range(files):
        name = f"/src/d{number % 20}/f{number}.c"
        script.files[script.file(name)].size = kib << 10
        names.append(name)
    return names


def test_mru_searches_a_tree_that_does_not_fit() -> None:
    script = Script()
    names = tree(script)
    for _ in range(5):
        for name in names:
            script.scan(name)
    found = compare("mru", script, 25 * MIB, skip_kib=128, recent_mib=1)
    assert found.lru.hit_bytes == 0
    assert found.policy.totals["read_bytes"] <= 0.6 * found.default.totals["read_bytes"]
    assert found.policy.hit_bytes >= 0.85 * found.optimum.hit_bytes


def test_mru_marks_all_of_a_large_read() -> None:
    """What is read 8 MiB at a time is used as what is read in small pieces is."""
    hits = []
    for piece in (128 << 10, 8 * MIB):
        script = Script()
        data = script.has("/data/set.bin", 64)
        for _ in range(4):
            script.scan(data, piece=piece)
        found = compare("mru", script, 32 * MIB, skip_kib=128, recent_mib=8)
        hits.append(found.policy.hit_bytes)
        assert found.lru.hit_bytes == 0
    assert hits[1] >= 0.8 * hits[0] > 0


def test_fifo_forgets_what_came_first_however_often_it_is_used() -> None:
    script = Script()
    hot, cold = script.has("/d/hot.bin", 4), script.has("/d/cold.bin", 40)
    script.scan(hot)
    for start in range(0, 40, 4):
        script.scan(hot)
        script.scan(cold, start * MIB, (start + 4) * MIB)
    found = compare("fifo", script, 16 * MIB)
    assert found.lru.hit_bytes == 10 * 4 * MIB
    # The hot file leaves about every fourth time.
    assert 5 * 4 * MIB <= found.policy.hit_bytes <= 9 * 4 * MIB


def s3fifo_hits(reads: Sequence[str], capacity: int) -> int:
    """How many reads of objects of one size algorithm 1 of the paper serves from the cache."""
    small, main = OrderedDict[str, int](), OrderedDict[str, int]()  # object: uses
    ghosts = OrderedDict[str, None]()
    hits = 0
    for name in reads:
        queue = small if name in small else main
        if name in queue:
            hits += 1
            queue[name] = min(queue[name] + 1, 3)
            continue
        while len(small) + len(main) >= capacity:
            if 10 * len(small) >= capacity or not main:
                oldest, uses = small.popitem(last=False)
                if uses > 1:
                    main[oldest] = 0
                else:
                    ghosts[oldest] = None
                    if len(ghosts) > capacity * 9 // 10:
                        ghosts.popitem(last=False)
            else:
                oldest, uses = main.popitem(last=False)
                if uses:
                    main[oldest] = uses - 1
        (main if name in ghosts else small)[name] = 0
        ghosts.pop(name, None)
    return hits


@pytest.mark.parametrize(("capacity", "many"), [(16, 10), (30, 20), (60, 40)])
def test_s3fifo_does_what_the_paper_says(capacity: int, many: int) -> None:
    """Hot pieces among many that are read once: as many hits as the algorithm has."""
    script, choose = Script(), random.Random(3)
    hot = [script.has(f"/hot/{n}", 1) for n in range(many)]
    wonders = [script.has(f"/once/{n}", 1) for n in range(200)]
    reads = hot * 2
    for number, name in enumerate(wonders):
        reads += [name, *choose.choices(hot, k=1 + number % 2)]
    for name in reads:
        script.scan(name)
    found = compare("s3fifo", script, capacity * MIB)
    assert found.policy.hit_bytes > 1.15 * found.lru.hit_bytes
    assert abs(found.policy.hit_bytes - s3fifo_hits(reads, capacity) * MIB) <= 1 * MIB


def test_a_ghost_of_s3fifo_is_forgotten_when_more_was_evicted_than_fits() -> None:
    """What is scanned twice, far apart, has not been used again soon: hot files stay."""
    script = Script()
    hot = [script.has(f"/hot/{n}", 1) for n in range(8)]
    scanned = script.has("/once/scan.bin", 96)
    for name in hot * 3:
        script.scan(name)
    for _ in range(3):
        for start in range(96):
            script.scan(scanned, start * MIB, (start + 1) * MIB)
            script.scan(hot[start % 8])
    found = compare("s3fifo", script, 16 * MIB)
    reads = 3 * 96 + 2 * 8
    assert found.policy.hit_bytes >= 0.9 * reads * MIB


def test_s3fifo_forgets_in_the_order_of_arrival() -> None:
    """One more use does not save what came first, as it does in an LRU: the queues are FIFO."""
    script = Script()
    first, others = script.has("/d/first.bin", 4), script.has("/d/others.bin", 24)
    script.scan(first)
    for start in range(0, 12, 2):
        script.scan(others, start * MIB, (start + 2) * MIB)
        if start == 4:
            script.scan(first)
    script.scan(first)
    found = compare("s3fifo", script, 12 * MIB)
    assert found.lru.hit_bytes == 2 * 4 * MIB
    assert found.policy.hit_bytes <= 5 * MIB
