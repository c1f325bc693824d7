# SPDX-License-Identifier: Apache-2.0
"""cyclic: within 5% of the optimum where LRU hits nothing."""

from __future__ import annotations

import pytest

from tests.unit.policies.traces import MIB, Script, compare


def scans(files: int, mib: int, rounds: int = 5) -> Script:
    script = Script()
    names = [script.has(f"/m/shard-{i}", mib) for i in range(files)]
    for _ in range(rounds):
        for name in names:
            script.scan(name)
    return script


@pytest.mark.parametrize("files", [1, 3])
def test_half_as_much_again_as_memory(files: int) -> None:
    found = compare("cyclic", scans(files, 96 // files), 64 * MIB, budget_mib=62, window_kib=512)
    assert found.lru.hit_bytes == found.default.hit_bytes == 0
    assert found.policy.hit_bytes >= 0.95 * found.optimum.hit_bytes
    assert found.policy.totals["unused_bytes"] == 0


def test_a_model_that_fits_is_left_alone() -> None:
    found = compare("cyclic", scans(1, 32), 64 * MIB, budget_mib=60)
    assert found.policy.totals["read_bytes"] == 32 * MIB
    assert found.policy.hit_bytes == found.default.hit_bytes


def test_the_stream_leaves_the_cache_behind_the_reader() -> None:
    script = scans(1, 48, rounds=1)
    found = compare("cyclic", script, 64 * MIB, budget_mib=8, window_kib=0)
    assert found.policy.totals["peak_bytes"] <= (8 + 2) * MIB
    assert found.policy.gauges["granted_pages"] == 8 * 256
