# SPDX-License-Identifier: Apache-2.0
"""Which models a node should bring into its page cache, and how much of that it may.

People say so by an annotation of the node, and so of a pool of nodes at once:

    kubectl annotate nodes -l pool=h100 pagecache-bpf.io/prewarm=qwen2.5-72b,93f0c2a1b7d45e68

Only models that the node watches anyhow can be named: an annotation gives no right to have other
files read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pagecache_bpf.placement.labels import DOMAIN
from pagecache_bpf.placement.load_score import ModelScore, NodeScores
from pagecache_bpf.placement.warm_gates import MIN, WANTED

ANNOTATION = f"{DOMAIN}/prewarm"
_MOST = 256


@dataclass(frozen=True)
class PrewarmPlan:
    """What to read now, in order, and sentences about what was asked for and is left."""

    read: tuple[ModelScore, ...]
    left: tuple[str, ...]


def asked_for(annotations: Mapping[str, str]) -> list[str]:
    """Return the names and content identities that the annotations of a node ask for.

    Args:
        annotations: of the Node object.

    Returns:
        What is named, each once and in order; what is beyond a bound is left away.
    """
    texts = [annotations.get(key, "") for key in (ANNOTATION, WANTED)]
    names = [name.strip() for text in texts for name in text.split(",")]
    return list(dict.fromkeys(name for name in names if name))[:_MOST]


def plan_prewarm(asked: list[str], scores: NodeScores, budget: int | None = None) -> PrewarmPlan:
    """Decide what to read.

    Args:
        asked: see asked_for().
        scores: of this node.
        budget: bytes that may be brought in; by default half of what the node may still cache.

    Returns:
        The plan.  Nothing is read while somebody loads a model here: the device is theirs.
    """
    if budget is None:
        budget = (scores.free_budget_bytes or 0) // 2
    read, left = [], []
    for name in asked:
        model = scores.find(name)
        if model is None:
            left.append(f"{name} is not one of this node's models")
            continue
        absent = model.bytes - min(model.resident_bytes or 0, model.bytes)
        if model.fraction >= max(MIN, 1 - (64 << 20) / model.bytes) or model in read:
            continue
        if absent > budget:
            left.append(f"{name} wants {absent} bytes more, and {budget} are left of the budget")
            continue
        budget -= absent
        read.append(model)
    if scores.running and read:
        left.append(f"{', '.join(scores.running)} is being loaded: prewarming waits")
        read = []
    return PrewarmPlan(tuple(read), tuple(left))
