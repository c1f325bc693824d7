# SPDX-License-Identifier: Apache-2.0
"""multiplex: models under one budget, by the plan of the serving layer or by their own rhythm."""

from __future__ import annotations

import random

import pytest

from pagecache_bpf.simulate.simulator import Replay
from tests.unit.policies.traces import MIB, Script, compare, simulator

MEMORY = 18  # MiB
EQUAL = (12, 12, 12)  # MiB, of three models: twice the memory
UNEQUAL = [(4, 12, 16), (16, 12, 4)]  # the most wanted one is the smallest, or the largest


def switches(seed: int, plans: bool, count: int = 40, sizes: tuple[int, ...] = EQUAL) -> Script:
    """Zipf-distributed requests; plans: the serving layer knows its queue."""
    script, models = Script(), "abc"
    for model, size in zip(models, sizes, strict=True):
        script.has(f"/{model}/w.bin", size, model)
    order = random.Random(seed).choices(models, weights=[6, 3, 2], k=count)
    for at, model in enumerate(order):
        script.seconds = 1.0 + 2 * at
        for other in models if plans else "":
            ahead = (n for n in range(at + 1, count) if order[n] == other)
            due = 1 + 2 * next(ahead, 500)
            script.tell("plans", {"model": other}, due_ns=due * 10**9)
        script.scan(f"/{model}/w.bin")
    return script


@pytest.mark.parametrize("seed", range(5))
def test_with_a_plan_it_is_close_to_the_optimum(seed: int) -> None:
    found = compare("multiplex", switches(seed, plans=True), MEMORY * MIB)
    assert found.policy.reread_bytes <= 0.60 * found.default.reread_bytes
    assert found.policy.reread_bytes <= 1.15 * found.optimum.reread_bytes


@pytest.mark.parametrize("sizes", UNEQUAL)
@pytest.mark.parametrize("seed", range(2))
def test_sizes_that_differ_are_no_obstacle(seed: int, sizes: tuple[int, ...]) -> None:
    """By the byte: neither a small nor a large model is preferred for its size."""
    found = compare("multiplex", switches(seed, plans=True, sizes=sizes), MEMORY * MIB)
    assert found.policy.reread_bytes <= 0.60 * found.default.reread_bytes
    assert found.policy.reread_bytes <= 1.15 * found.optimum.reread_bytes


@pytest.mark.parametrize("seed", range(5))
def test_without_a_plan_it_is_no_worse_than_the_default(seed: int) -> None:
    found = compare("multiplex", switches(seed, plans=False), MEMORY * MIB)
    assert found.policy.reread_bytes <= found.default.reread_bytes


def test_the_model_that_is_expensive_to_read_stays() -> None:
    script = Script()
    for model in "abc":
        script.has(f"/{model}/w.bin", 8, model)
        script.tell("plans", {"model": model}, mb_per_s=100 if model == "a" else 2000)
    for name in "abc":
        script.scan(f"/{name}/w.bin")
        script.wait(5)
    script.scan("/a/w.bin")
    found = compare("multiplex", script, 16 * MIB)
    assert found.policy.hit_bytes == 8 * MIB and found.lru.hit_bytes == 0


def test_the_score_of_each_model_can_be_read() -> None:
    scores: dict[int, dict[str, int]] = {}

    def look(replay: Replay, _: int) -> None:
        scores.update({row["value"]["model"]: row["value"] for row in replay.report("scores")})

    script = switches(1, plans=True, count=6)
    simulator("multiplex").replay(script.settle(), MEMORY * MIB, watch=look)
    used = [scores[n] for n in (1, 2, 3) if n in scores]
    assert len(used) >= 2
    assert 0 < sum(score["resident_pages"] for score in used) <= MEMORY * 256
    assert all(score["uses"] for score in used)


def test_a_plan_whose_time_is_over_holds_nothing() -> None:
    """Model a was to be used at second 2, and nobody came: b and c have the memory."""
    script = Script()
    for model in "abc":
        script.has(f"/{model}/w.bin", 8, model)
    script.tell("plans", {"model": "a"}, due_ns=2 * 10**9)
    script.scan("/a/w.bin")
    script.wait(60)
    for _ in range(4):
        for model in "bc":
            script.scan(f"/{model}/w.bin")
            script.wait(5)
    found = compare("multiplex", script, 18 * MIB)
    assert found.policy.hit_bytes >= 2 * 3 * 8 * MIB - 2 * MIB


def test_more_models_than_slots_have_one_each() -> None:
    """Numbers of models only grow; the 65th does not share the slot of the first."""
    script = Script()
    for number in range(70):
        script.has(f"/m{number}/w.bin", 1, f"m{number}")
        script.scan(f"/m{number}/w.bin")
        script.wait(1)
    scores: dict[int, dict[str, int]] = {}

    def look(replay: Replay, _: int) -> None:
        scores.clear()
        scores.update({row["value"]["model"]: row["value"] for row in replay.report("scores")})

    simulator("multiplex").replay(script.settle(), 8 * MIB, watch=look)
    resident = {model: score["resident_pages"] for model, score in scores.items()}
    assert resident[70] == 256 and 0 <= sum(resident.values()) <= 8 * 256
