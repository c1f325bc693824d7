# SPDX-License-Identifier: Apache-2.0
"""How the router ranks replicas, with Ray's own request objects and without a cluster."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed")

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest

from pagecache_bpf.ray import LOOK, SECONDS, ResidencyRouter


def replica(name: str, seconds: Any, *loaded: str) -> SimpleNamespace:
    stats = {SECONDS: seconds, LOOK: 1}
    return SimpleNamespace(replica_id=name, routing_stats=stats, multiplexed_model_ids=set(loaded))


REPLICAS = [
    replica("cold", {"m": 8.0}),
    replica("warm", {"m": 1.0}),
    replica("alike", {"m": 1.1}),
    replica("lie", {"m": math.nan}),
    replica("nonsense", "m"),
    replica("loaded", {"m": 5.0}, "m"),
]


def router(stale_s: float = 60.0) -> Any:
    """The router as Ray has it after its replicas are known."""
    made: Any = object.__new__(ResidencyRouter)
    made.initialize_state(stale_s=stale_s)
    made._replicas = {replica.replica_id: replica for replica in REPLICAS}
    made._multiplexed_model_id_to_replica_ids = defaultdict(set, {"m": {"loaded"}})
    return made


def ranks(made: Any, model: str, waited: float) -> list[list[str]]:
    async def choose() -> list[list[str]]:
        metadata = RequestMetadata(
            request_id="r", internal_request_id="i", multiplexed_model_id=model
        )
        request = PendingRequest([], {}, metadata, created_at=time.time() - waited)
        found = await made.choose_replicas(REPLICAS, request)
        assert request.routing_context.should_backoff  # without it Ray asks without a pause
        return [[replica.replica_id for replica in rank] for rank in found]

    return asyncio.run(choose())


def test_loaded_then_soonest_then_unknown() -> None:
    made = router()
    assert ranks(made, "m", 0.0) == [["loaded"]]  # worth waiting for: a load takes longer
    found = ranks(made, "m", 2.0)
    assert found[0] == ["loaded"] and set(found[1]) == {"warm", "alike"}
    assert found[2] == ["cold"] and set(found[3]) == {"lie", "nonsense"}


def test_statistics_that_are_stale_hold_nobody_up() -> None:
    made = router(stale_s=0.0)
    ranks(made, "m", 100.0)
    time.sleep(0.01)  # longer than they are good for
    found = ranks(made, "m", 2.0)
    assert found[0] == ["loaded"] and sum(map(len, found)) == len(REPLICAS)


def test_replicas_that_are_alike_take_turns() -> None:
    made = router()
    firsts = {ranks(made, "", 0.0)[0][0] for _ in range(200)}
    assert firsts == {replica.replica_id for replica in REPLICAS}
