# SPDX-License-Identifier: Apache-2.0
"""1,000 nodes publish their labels: what the API server gets to write, by its own audit log."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime

import pytest

from pagecache_bpf.placement.labels import LabelPlan, label_key
from pagecache_bpf.placement.load_score import NodeScores
from pagecache_bpf.placement.node_labels import NodePatch
from tests.cluster.machine import Machine
from tests.cluster.private import STATE
from tests.cluster.simulated import node
from tests.unit.test_placement_score import scores

NODES = 1000
#: Each node is due once in an interval, at its own moment.
INTERVALS = 2
LIMIT = 50
AUDIT = STATE / "audit.log"


@pytest.fixture
def nodes(cluster: Machine) -> list[str]:
    """So many Node objects, without a kubelet and a heartbeat; they stay: this file is the last."""
    names = [f"simulated-{number:04}" for number in range(NODES)]
    items = {"apiVersion": "v1", "kind": "List", "items": [node(name) for name in names]}
    cluster.kubectl("create", "-f", "-", given=json.dumps(items))
    return names


def changed(model: NodeScores, chance: random.Random) -> NodeScores:
    """The same node with other shares: every node changes at every look."""
    models = tuple(
        replace(score, resident_bytes=int(score.bytes * chance.random())) for score in model.models
    )
    return replace(model, models=models)


def test_a_thousand_nodes_stay_under_the_limit(cluster: Machine, nodes: list[str]) -> None:
    chance = random.Random(1)
    model = scores().models[0]
    contents = [f"{number:016x}" for number in range(1, 9)]
    known = tuple(replace(model, content=content) for content in contents)
    told = {name: scores(node=name, models=known, running=()) for name in nodes}
    plans = {name: LabelPlan(name) for name in nodes}
    interval = plans[nodes[0]].interval
    before = time.time()
    with ThreadPoolExecutor(16) as pool:
        while time.time() < before + INTERVALS * interval:
            now = time.time()
            work = []
            for name, plan in plans.items():
                change = plan.update(now, changed(told[name], chance))
                if change is not None:
                    work.append(pool.submit(NodePatch(cluster.api, name).publish, change))
            for publishing in work:
                publishing.result()
            time.sleep(max(0.0, now + 0.25 - time.time()))
    written = audited(set(nodes), before)
    seconds = Counter(int(at) for at in written)
    most, mean = max(seconds.values()), len(written) / (INTERVALS * interval)
    (STATE / "label-writes.json").write_text(
        json.dumps({"nodes": NODES, "writes": len(written), "mean": mean, "most": most})
    )
    assert len(written) > (INTERVALS - 0.5) * NODES, len(written)
    assert most < LIMIT, seconds
    items = cluster.get("nodes")["items"]
    keys = {label_key(content) for content in contents}
    assert sum(1 for node in items if keys & node["metadata"]["labels"].keys()) >= NODES - 1


def audited(names: set[str], since: float) -> list[float]:
    """When the API server took a patch of one of these nodes, by its audit log."""
    found = []
    for line in AUDIT.read_text().splitlines():
        event = json.loads(line)
        if event["objectRef"]["name"] in names and event["responseStatus"]["code"] == 200:
            at = datetime.fromisoformat(event["requestReceivedTimestamp"][:19] + "+00:00")
            if at.timestamp() >= int(since):
                found.append(at.timestamp())
    return found
