# SPDX-License-Identifier: Apache-2.0
"""Warm first, then start: pods that wait behind a scheduling gate until a node has their model.

A pod with the label pagecache-bpf.io/warm-first=true, the scheduling gate pagecache-bpf.io/warm and
the annotation pagecache-bpf.io/model waits until a node has MIN of the model in its page cache, and
WAIT seconds at most: a model that nobody can bring in keeps no pod from starting.  The node with
most of it already (then: most room) is asked to bring it in; where the pod then goes is the
scheduler's to decide, by labels or extender.

Source: schedulingGates of a pod, stable since Kubernetes 1.30 (KEP-3521).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.placement.extender import MODEL_ANNOTATION
from pagecache_bpf.placement.kubernetes_api import JSON_PATCH, KubernetesApi
from pagecache_bpf.placement.labels import DOMAIN
from pagecache_bpf.placement.load_score import NodeScores

GATE = f"{DOMAIN}/warm"
SELECTOR = f"{DOMAIN}/warm-first=true"
#: On a Node: contents to bring in for gated pods; beside what people ask for (prewarm.ANNOTATION).
WANTED = f"{DOMAIN}/prewarm-gated"
MIN = 0.9
WAIT = 300.0


@dataclass(frozen=True)
class GatePlan:
    """What to do: pods to release (as the API gave them), contents to bring in by node."""

    release: tuple[Mapping[str, Any], ...]
    warm: Mapping[str, tuple[str, ...]]


def plan_gates(
    pods: Iterable[Mapping[str, Any]], nodes: Sequence[NodeScores], now: float
) -> GatePlan:
    """Decide for all gated pods.

    Args:
        pods: Pod objects; those without the gate are passed over.
        nodes: what the nodes say.
        now: seconds since 1970.

    Returns:
        Pods to let go, and what to prefetch on which node meanwhile: a pod goes when a node has
        enough of its model, when it has waited long enough, or when no node knows the model.
    """
    release = []
    warm: dict[str, dict[str, None]] = {}
    for pod in pods:
        if _gate(pod) is None:
            continue
        metadata = pod["metadata"]
        model = str((metadata.get("annotations") or {}).get(MODEL_ANNOTATION, ""))
        known = [(node, found) for node in nodes if (found := node.find(model))]
        if not known or _age(metadata, now) > WAIT:
            release.append(pod)
            continue
        node, best = max(
            known, key=lambda pair: (pair[1].fraction, pair[0].free_budget_bytes or 0, pair[0].node)
        )
        if best.fraction >= MIN:
            release.append(pod)
        else:
            warm.setdefault(node.node, {})[best.content] = None
    return GatePlan(tuple(release), {node: tuple(names) for node, names in warm.items()})


def run_gates(api: KubernetesApi, nodes: Sequence[NodeScores], now: float) -> list[str]:
    """Look at all gated pods and do what plan_gates() says.

    Args:
        api: may list and patch pods, and list and patch nodes.
        nodes: what the nodes say.
        now: seconds since 1970.

    Returns:
        Names of the pods that were released, with their namespaces.

    Raises:
        PagecacheError: the API server does not answer.
    """
    selector = quote(SELECTOR, safe="")
    plan = plan_gates(api.items(f"/api/v1/pods?labelSelector={selector}"), nodes, now)
    for node in api.items("/api/v1/nodes", metadata=True):
        metadata = node.get("metadata") or {}
        asked = (metadata.get("annotations") or {}).get(WANTED)
        wanted = ",".join(plan.warm.get(str(metadata.get("name")), ())) or None
        if asked != wanted:
            path = f"/api/v1/nodes/{quote(str(metadata['name']), safe='')}"
            api.patch(path, {"metadata": {"annotations": {WANTED: wanted}}})
    released = []
    for pod in plan.release:
        namespace, name = (str(pod["metadata"][key]) for key in ("namespace", "name"))
        at = f"/spec/schedulingGates/{_gate(pod)}"
        patch = [
            {"op": "test", "path": f"{at}/name", "value": GATE},
            {"op": "remove", "path": at},
        ]
        path = f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(name)}"
        try:
            api.patch(path, patch, JSON_PATCH)
        except PagecacheError:  # it has gone, or somebody else released it: the next round sees
            continue
        released.append(f"{namespace}/{name}")
    return released


def _gate(pod: Mapping[str, Any]) -> int | None:
    """Return which of a pod's gates is ours; None: none of them."""
    gates = (pod.get("spec") or {}).get("schedulingGates") or []
    return next((at for at, gate in enumerate(gates) if gate.get("name") == GATE), None)


def _age(metadata: Mapping[str, Any], now: float) -> float:
    try:
        text = str(metadata["creationTimestamp"]).replace("Z", "+00:00")
        return now - datetime.fromisoformat(text).timestamp()
    except (KeyError, ValueError):
        return WAIT + 1  # nobody knows how long it has waited
