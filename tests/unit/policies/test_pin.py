# SPDX-License-Identifier: Apache-2.0
"""pin: what is pinned stays, within its budget; a promise that is not kept can be seen."""

from __future__ import annotations

from tests.unit.policies.traces import MIB, Script, compare, simulator


def pinned_beside_a_scan(**knobs: int) -> tuple[Script, dict[str, int]]:
    script = Script()
    weights = script.has("/weights/w.bin", 16)
    noise = script.has("/data/d.bin", 64, governed=False)
    script.scan(weights)
    script.scan(noise)
    script.scan(weights)
    return script, {"reread_mib_per_s": 0, **knobs}


def test_a_scan_does_not_push_it_out() -> None:
    script, knobs = pinned_beside_a_scan(budget_mib=16)
    found = compare("pin", script, 32 * MIB, **knobs)
    assert found.default.hit_bytes == 0
    assert found.policy.hit_bytes == 16 * MIB == found.optimum.hit_bytes
    assert found.policy.gauges == {"promised_pages": 4096, "pinned_pages": 4096}


def test_the_first_part_only() -> None:
    script, knobs = pinned_beside_a_scan(first_mib=4)
    found = compare("pin", script, 32 * MIB, **knobs)
    assert found.policy.hit_bytes == 4 * MIB
    assert found.policy.gauges["promised_pages"] == 1024


def test_hot_pieces_by_hint() -> None:
    script = Script()
    weights = script.has("/weights/w.bin", 16)
    noise = script.has("/data/d.bin", 64, governed=False)
    for piece in (3, 7, 9):
        script.tell("hot", {"file": weights, "piece": piece}, value=1)
    script.scan(weights)
    script.scan(noise)
    script.scan(weights)
    found = compare("pin", script, 32 * MIB, hot_only=1, reread_mib_per_s=0)
    assert found.policy.hit_bytes == 3 * MIB


def test_the_budget_bounds_it_and_the_rest_is_the_kernels() -> None:
    script, knobs = pinned_beside_a_scan(budget_mib=6)
    found = compare("pin", script, 32 * MIB, **knobs)
    assert found.policy.hit_bytes == 6 * MIB
    assert found.policy.gauges["promised_pages"] == 6 * 256


def test_a_broken_promise_shows() -> None:
    """Memory smaller than the promise: the gauge says how much is missing."""
    script = Script()
    weights = script.has("/weights/w.bin", 16)
    script.scan(weights)
    script.settle()
    result = simulator("pin").replay(script, 8 * MIB, knobs={"budget_mib": 16})
    assert result.gauges["promised_pages"] == 4096
    assert 0 < result.gauges["pinned_pages"] <= 2048
