# SPDX-License-Identifier: Apache-2.0
"""Budgets: what a load is told, and what it is charged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagecache_bpf.controller.admission import LEAST_BYTES, RULES, Budgets, Claim, refusal
from pagecache_bpf.controller.load_ledger import headroom

GB = 10**9


def files(**sizes: int) -> dict[bytes, int]:
    return {name.encode(): size for name, size in sizes.items()}


def take(budgets: Budgets, name: str, contents: dict[bytes, int], asked: int | None = None) -> str:
    """Admit and claim; the kind of the decision."""
    decision = budgets.decide(name, contents, asked)
    if decision.granted:
        budgets.claim(name, Claim(name, 0, contents, decision.granted))
    return decision.kind


def test_without_bounds_everything_fits() -> None:
    decision = Budgets().decide("m", files(a=61 * GB))
    assert (decision.kind, decision.granted) == ("fits", 61 * GB)


@pytest.mark.parametrize("where", ["total", "model", "asked"])
def test_the_message_of_the_issue(where: str) -> None:
    budgets = Budgets(
        total=40 * GB if where == "total" else None,
        models={"m": 40 * GB} if where == "model" else {},
    )
    decision = budgets.decide("m", files(a=61 * GB), 40 * GB if where == "asked" else None)
    assert (decision.kind, decision.granted) == ("stream", 40 * GB)
    assert decision.message == "61.0 GB wanted, 40.0 GB budget, will stream"


def test_a_load_may_ask_for_less_than_configured_never_for_more() -> None:
    budgets = Budgets(models={"m": 10 * GB})
    assert budgets.of_model("m", 5 * GB) == 5 * GB
    assert budgets.of_model("m", 50 * GB) == 10 * GB
    assert budgets.of_model("other", 50 * GB) == 50 * GB


def test_memory_is_a_bound_too() -> None:
    decision = Budgets().decide("m", files(a=61 * GB), headroom=16 * GB)
    assert decision.message == "61.0 GB wanted, 16.0 GB memory left, will stream"
    assert decision.granted == 16 * GB


def test_what_others_hold_is_taken() -> None:
    budgets = Budgets(total=40 * GB)
    assert take(budgets, "first", files(a=30 * GB)) == "fits"
    decision = budgets.decide("second", files(b=20 * GB))
    assert decision.message == "20.0 GB wanted, 10.0 GB budget left, will stream"
    budgets.release("first")
    assert budgets.decide("second", files(b=20 * GB)).kind == "fits"


@pytest.mark.parametrize(("rule", "kind"), [("stream", "refuse"), ("queue", "queue")])
def test_too_little_is_left_to_stream(rule: str, kind: str) -> None:
    budgets = Budgets(total=LEAST_BYTES * 2, rule=rule)
    take(budgets, "first", files(a=LEAST_BYTES * 2 - 1))
    decision = budgets.decide("second", files(b=LEAST_BYTES))
    assert (decision.kind, decision.granted) == (kind, 0)
    assert "was not admitted" in str(refusal("second", decision))


def test_queue_waits_only_for_what_may_come() -> None:
    budgets = Budgets(total=40 * GB, rule="queue")
    # Larger than all there ever is: waiting would be for ever.
    assert budgets.decide("m", files(a=61 * GB)).kind == "stream"
    take(budgets, "first", files(a=30 * GB))
    assert budgets.decide("m", files(b=20 * GB)).kind == "queue"


def test_refuse_refuses_what_the_budget_of_its_own_does_not_help() -> None:
    budgets = Budgets(total=40 * GB, rule="refuse")
    assert budgets.decide("m", files(a=61 * GB)).kind == "refuse"
    # A model that has a smaller budget of its own streams within that.
    assert budgets.decide("m", files(a=61 * GB), 10 * GB).kind == "stream"


def test_ranks_of_a_model_are_charged_once() -> None:
    budgets = Budgets(total=40 * GB)
    shards = files(a=15 * GB, b=15 * GB)
    assert take(budgets, "rank0", shards) == take(budgets, "rank1", shards) == "fits"
    assert budgets.charges() == {"rank0": 30 * GB, "rank1": 0}
    budgets.release("rank0")  # the other one has them still
    assert budgets.charges() == {"rank1": 30 * GB}


_SIZES = st.dictionaries(st.binary(min_size=1, max_size=1), st.integers(0, 100), max_size=4)


@given(
    st.integers(1, 200),
    st.sampled_from(RULES),
    st.lists(st.tuples(_SIZES, st.none() | st.integers(1, 100)), max_size=8),
)
def test_the_total_is_never_exceeded(
    total: int, rule: str, wishes: list[tuple[dict[bytes, int], int | None]]
) -> None:
    unit = LEAST_BYTES // 10
    budgets = Budgets(total=total * unit, rule=rule)
    for at, (sizes, asked) in enumerate(wishes):
        # A file has one size, whoever names it.
        contents = {key: (key[0] % 50) * unit for key in sizes}
        take(budgets, f"load{at}", contents, None if asked is None else asked * unit)
        assert budgets.claimed <= total * unit


def test_headroom_is_the_kernels() -> None:
    import os

    found = headroom(os.getpid())
    assert found is not None and 0 < found < 1 << 50
