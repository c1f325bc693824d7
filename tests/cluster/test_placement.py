# SPDX-License-Identifier: Apache-2.0
"""Pods land where their model is warm, by labels; without these, as ever."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from pagecache_bpf.placement.labels import LabelChange, label_key
from pagecache_bpf.placement.node_labels import EXPIRES, NodePatch, sweep
from tests.cluster.conftest import MODELS, NAMESPACE
from tests.cluster.machine import NODE, Machine
from tests.cluster.second_node import (
    PODS,
    SIMULATED,
    Placed,
    kubectl_proxy,
    on_node2,
    second_node,
    some,
    tiny,
)
from tests.cluster.simulated import lands, simulated
from tests.cluster.test_daemonset import removed, rolled_out
from tests.unit.command import ROOT

DOCUMENT = (ROOT / "docs/cluster.md").read_text()


@pytest.fixture(scope="module")
def placed(cluster: Machine) -> Iterator[Placed]:
    """The plain manifests as they are, and node2 with an exporter and a publisher of labels."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        for file in ("pagecache-bpf.yaml", "placement.yaml"):
            cluster.kubectl("apply", "-f", str(ROOT / "packaging/kubernetes" / file))
        rolled_out(cluster)
        rolled_out(cluster, "pagecache-bpf-node")
        with second_node(cluster) as made:
            yield made
    finally:
        removed(cluster)
        roles = "clusterroles,clusterrolebindings"  # of no namespace
        cluster.kubectl("delete", roles, "pagecache-bpf-placement", "--ignore-not-found")


def documented_affinity(content: str) -> dict[str, Any]:
    """The affinity of docs/cluster.md, for a model."""
    block = re.search(r"```yaml\n(affinity:\n.*?)```", DOCUMENT, re.S)
    assert block
    text = re.sub(r"pagecache-bpf\.io/[0-9a-f]{16}", label_key(content), block[1])
    found: dict[str, Any] = yaml.safe_load(text)["affinity"]
    return found


def test_pods_land_by_labels(placed: Placed) -> None:
    """The DaemonSet labels node1, a process of ours node2; both at their own time."""
    cluster, contents = placed.cluster, placed.contents
    placed.warm("llama", MODELS)
    placed.warm("qwen", placed.other)
    # Without a wish they go to the empty node.
    assert set(lands(cluster, *some("plain"))) == {SIMULATED}
    with kubectl_proxy(cluster) as url:
        publisher = on_node2("kube-node", "--labels=api", f"--api={url}", str(placed.other))
        try:
            # A look is 15 s old at most, and no node writes twice in a minute.
            wanted = {
                NODE: {contents["llama"]: "90"},
                SIMULATED: {contents["qwen"]: "90"},
            }

            def labelled() -> bool:
                found = {node: placed.labels(node) for node in wanted}
                assert found == wanted, found
                return True

            cluster.wait("both nodes are labelled", labelled, 240)
        finally:
            publisher.terminate()
            assert publisher.wait(timeout=60) == 0
    for name, node in (("llama", NODE), ("qwen", SIMULATED)):
        affinity = documented_affinity(contents[name])
        assert lands(cluster, *some(name, affinity=affinity)) == [node] * PODS


def test_expired_labels_are_swept_and_change_only_where_pods_land(placed: Placed) -> None:
    """node3's agent has died: the extender of the manifests takes its labels away."""
    cluster, content = placed.cluster, "0123456789abcdef"
    affinity = documented_affinity(content)
    with simulated(cluster, ["node3"]):
        patch = NodePatch(cluster.api, "node3")
        patch.publish(LabelChange({label_key(content): "90"}, (), time.time() + 3600))
        assert lands(cluster, *some("live", affinity=affinity)) == ["node3"] * PODS
        assert sweep(cluster.api, time.time()) == []
        patch.publish(LabelChange({label_key(content): "90"}, (), time.time() - 1))
        cluster.wait("the labels are swept", lambda: not placed.labels("node3"))
        assert EXPIRES not in cluster.get("node", "node3")["metadata"].get("annotations", {})
        # Nobody has the label any more, and all pods land as others do.
        assert NODE not in lands(cluster, *some("expired", affinity=affinity))


def test_this_release_has_no_scheduling_gates(placed: Placed) -> None:
    """They came with 1.26: here the field is dropped, and such a pod is scheduled like any other.

    Gates are tested against the schemas of the API only (tests/unit).
    """
    gated = tiny("gated", schedulingGates=[{"name": "pagecache-bpf.io/warm"}])
    with pytest.raises(AssertionError, match="schedulingGates"):
        placed.cluster.apply(gated)  # kubectl itself refuses what the server does not know
