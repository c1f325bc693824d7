# SPDX-License-Identifier: Apache-2.0
"""Answers kube-scheduler's `prioritize` from the scores of the nodes.

The scheduler posts ExtenderArgs {Pod, Nodes | NodeNames} and gets a HostPriorityList
[{Host, Score}], scores 0 to 10 (k8s.io/kube-scheduler/extender/v1, unchanged since Kubernetes 1.18;
its Go decoder takes names in any case, and so does this one).  The model is that of the pod's
annotation pagecache-bpf.io/model: a content identity, or a name.

A pod without the annotation gets the same score everywhere, and a node that says nothing, or
nothing new, is taken for a cold one with the slowest known device.  So nothing that fails here
does more than leave the scores as they would be without an extender.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pagecache_bpf.errors import UsageError
from pagecache_bpf.placement.load_score import NodeScores, relative

#: MaxExtenderPriority of the API.
MOST_POINTS = 10
MODEL_ANNOTATION = "pagecache-bpf.io/model"
#: A name of a node is a DNS subdomain; more nodes than this no cluster has.
_NODES = 100_000


def points(shares: Mapping[str, float]) -> dict[str, int]:
    """Return the extender's points, 0 to 10.

    Args:
        shares: what load_score.relative() says, by node.

    Returns:
        Whole points by node; only the best node can have 10.
    """
    return {name: math.floor(MOST_POINTS * share) for name, share in shares.items()}


def prioritize(
    args: Any, scores_of: Callable[[str], NodeScores | None]
) -> list[dict[str, str | int]]:
    """Answer a request.

    Args:
        args: ExtenderArgs, decoded.
        scores_of: gives what a node of that name says; None: nothing, or nothing new.

    Returns:
        A HostPriorityList: each of the nodes once.

    Raises:
        UsageError: these are no ExtenderArgs.
    """
    pod, nodes = _member(args, "pod"), _names(args)
    metadata = _member(pod, "metadata") or {}
    model = (_member(metadata, "annotations") or {}).get(MODEL_ANNOTATION)
    shares = dict.fromkeys(nodes, 0.0)
    if isinstance(model, str) and model:
        said = {name: scores_of(name) for name in nodes}
        found = {name: scores.find(model) if scores else None for name, scores in said.items()}
        cold = [score.cold_seconds for score in found.values() if score]
        # A node that does not have the model may have to fetch it first.
        unknown = max((value for value in cold if value is not None), default=None)
        shares = relative(
            {name: score.seconds if score else None for name, score in found.items()}, unknown
        )
    return [{"Host": name, "Score": score} for name, score in points(shares).items()]


def _member(value: Any, name: str) -> Any:
    """Return a member of an object, whatever the case of its name."""
    if not isinstance(value, dict):
        raise UsageError(f"{name} is missing", "what was posted is no ExtenderArgs")
    return next((item for key, item in value.items() if key.lower() == name), None)


def _names(args: Any) -> list[str]:
    names = _member(args, "nodenames")
    if names is None:
        nodes = _member(args, "nodes")
        items = _member(nodes, "items") if nodes is not None else None
        if not isinstance(items, list):
            raise UsageError("there are no nodes", "neither NodeNames nor Nodes is there")
        names = [_member(_member(item, "metadata"), "name") for item in items]
    if not isinstance(names, list) or len(names) > _NODES:
        raise UsageError("there are no nodes", "NodeNames is no list")
    if not all(isinstance(name, str) for name in names):
        raise UsageError("there are no nodes", "a name is no text")
    return list(dict.fromkeys(names))
