# SPDX-License-Identifier: Apache-2.0
"""kvcache: KV files do not displace weights; what is wanted soon stays within the budget."""

from __future__ import annotations

from tests.unit.policies.traces import MIB, Script, compare


def test_weights_stay() -> None:
    script = Script()
    weights = script.has("/w/w.bin", 20, governed=False)
    kv = script.has("/kv/kv.bin", 64)
    for _ in range(3):
        script.scan(weights)
        script.scan(kv)
    found = compare("kvcache", script, 32 * MIB, budget_mib=4)
    assert found.default.hit_bytes < 10 * MIB
    assert found.policy.hit_bytes >= 2 * 20 * MIB


def test_what_is_wanted_soon_is_kept() -> None:
    script = Script()
    kv = script.has("/kv/kv.bin", 64)
    for piece in range(8, 12):
        script.tell("next_use", {"file": kv, "piece": piece}, due_ns="+5s")
    script.scan(kv)
    script.scan(kv, 8 * MIB, 12 * MIB)
    found = compare("kvcache", script, 16 * MIB, budget_mib=8)
    assert found.lru.hit_bytes == 0
    assert found.policy.hit_bytes >= 4 * MIB - (256 << 10)


def test_hints_beyond_the_horizon_and_the_budget_do_not_count() -> None:
    script = Script()
    kv = script.has("/kv/kv.bin", 32)
    for piece in range(32):
        script.tell("next_use", {"file": kv, "piece": piece}, due_ns="+1h")
    script.scan(kv)
    found = compare("kvcache", script, 24 * MIB, budget_mib=8)
    assert found.policy.totals["peak_bytes"] <= 2 * MIB
    script = Script()
    kv = script.has("/kv/kv.bin", 32)
    for piece in range(32):
        script.tell("next_use", {"file": kv, "piece": piece}, due_ns="+9s")
    script.scan(kv)
    found = compare("kvcache", script, 24 * MIB, budget_mib=8)
    assert found.policy.totals["peak_bytes"] <= 10 * MIB


def test_what_is_wanted_last_goes_first() -> None:
    """Of whichever file: the one that is asked about first has what is wanted next."""
    script = Script()
    near, far = script.has("/kv/a.bin", 12), script.has("/kv/b.bin", 24)
    for piece in range(12):
        script.tell("next_use", {"file": near, "piece": piece}, due_ns="+2s")
    for piece in range(24):
        # In this file, too, what lies in front is wanted first.
        script.tell("next_use", {"file": far, "piece": piece}, due_ns=f"+{5 + piece // 6}s")
    for name in (near, far, near):
        script.scan(name)
    script.scan(far, 0, 2 * MIB)
    found = compare("kvcache", script, 20 * MIB, budget_mib=64)
    assert found.policy.hit_bytes >= 13 * MIB > found.lru.hit_bytes
