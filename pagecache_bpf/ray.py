# SPDX-License-Identifier: Apache-2.0
"""For those who use Ray Serve (extra `ray`): requests and replicas go where the weights are cached.

A deployment with @serve.multiplexed swaps models within its replicas, and each swap is a load whose
time depends on the page cache of the replica's node.  Three parts, each of use alone:

- RoutingStats: what a replica's node would need to load each model, for record_routing_stats;
- ResidencyRouter: sends a request for a model to a replica that has it, else to where it loads
  soonest, else anywhere;
- warm_nodes: where new replicas of a model should start, as ray_actor_options.

Nothing here needs a privilege; docs/cluster.md has an example.  What the statistics say is not
trusted: a replica that lies, or says nothing new, loses its place and no request.

Source: ray.serve.request_router of Ray 2.60 (alpha API).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from pagecache_bpf.errors import PagecacheError, UnsupportedError
from pagecache_bpf.placement.copy_speed import CopySpeed
from pagecache_bpf.placement.node_watch import NodeWatch, Speeds

try:
    import ray
    from ray.serve.request_router import (
        FIFOMixin,
        MultiplexMixin,
        PendingRequest,
        RequestRouter,
        RunningReplica,
    )
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise UnsupportedError(
        "pagecache_bpf.ray cannot be imported", str(error), "pip install 'pagecache-bpf[ray]'"
    ) from error

SECONDS = "pagecache_seconds_to_load"
LOOK = "pagecache_look"
#: Replicas whose seconds are within this factor are alike: among them the shortest queue decides.
ALIKE = 1.25
STALE_S = 60.0
#: A full replica that has the model is waited for so long where nothing is known of the others, as
#: Ray's own router does; and so long at most, whatever they say.
PATIENCE_S = 1.0
MOST_PATIENCE_S = 30.0
_MOST_MODELS = 4096


class RoutingStats:
    """What a deployment's record_routing_stats() returns for the router."""

    def __init__(
        self, models: Mapping[str, str | PathLike[str]], *, speeds: Speeds | None = None
    ) -> None:
        """Watch the models of this replica's node.

        Args:
            models: path by the model's id, as requests name it (serve.get_multiplexed_model_id).
            speeds: what is known of the node's speeds; the rest is measured.
        """
        copy = CopySpeed()
        self._watches = {
            model: NodeWatch([path], speeds=speeds, ask=_ask, copy=copy)
            for model, path in models.items()
        }
        self._looks = 0

    def record(self) -> dict[str, Any]:
        """Return the scores of this node's models; Ray Serve calls this again and again.

        Returns:
            Under SECONDS the seconds that a load of each model would take here now, by its name,
            without those that cannot be looked at; under LOOK the number of this look.
        """
        self._looks += 1
        seconds = {}
        for model, watch in self._watches.items():
            found = watch.scores().models
            if found and found[0].seconds is not None:
                seconds[model] = found[0].seconds
        return {SECONDS: seconds, LOOK: self._looks}


class ResidencyRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Routes by what loads soonest; for RequestRouterConfig(request_router_class=...)."""

    def initialize_state(self, *, stale_s: float = STALE_S) -> None:
        """Take request_router_kwargs.

        Args:
            stale_s: statistics in which nothing is new for so long count as none, in seconds.
        """
        self._stale_s = stale_s
        self._seen: dict[Any, tuple[object, float]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for a request.

        Args:
            candidate_replicas: those that run.
            pending_request: the request; None: any.

        Returns:
            Ranks, the best first; Ray takes the shorter queue of a rank's two, and goes on to the
            next rank where both are full.  A replica that has the model but is full is
            waited for as long as a load elsewhere would take, within bounds.
        """
        if pending_request is None:
            return _two_choices([candidate_replicas])
        context = pending_request.routing_context
        context.should_backoff = True  # otherwise Ray would ask again and again without a pause
        model = pending_request.metadata.multiplexed_model_id
        if not model:
            return _two_choices([candidate_replicas])
        loaded, fewest, others = self.rank_replicas_via_multiplex(candidate_replicas, model)
        ranks = self._by_seconds([*fewest, *others], model)
        if loaded and ranks:
            elsewhere = ranks[0][0] if math.isfinite(ranks[0][0]) else PATIENCE_S
            waited = time.time() - pending_request.created_at
            if waited < min(elsewhere, MOST_PATIENCE_S):
                return _two_choices([loaded])
        return _two_choices([loaded, *(rank for _, rank in ranks)])

    def _by_seconds(
        self, replicas: list[RunningReplica], model: str
    ) -> list[tuple[float, list[RunningReplica]]]:
        """Return ranks of replicas that load a model in about the same time, and that time."""
        known = [(self._seconds(replica, model), replica) for replica in replicas]
        known.sort(key=lambda pair: pair[0])
        ranks: list[tuple[float, list[RunningReplica]]] = []
        for seconds, replica in known:
            if ranks and (seconds <= ranks[-1][0] * ALIKE or math.isinf(ranks[-1][0])):
                ranks[-1][1].append(replica)
            else:
                ranks.append((seconds, [replica]))
        return ranks

    def _seconds(self, replica: RunningReplica, model: str) -> float:
        """Return what a replica says that a load would take it; infinity where it says nothing."""
        stats = replica.routing_stats
        seconds = stats.get(SECONDS) if isinstance(stats, dict) else None
        if not isinstance(seconds, dict) or len(seconds) > _MOST_MODELS:
            return math.inf
        now, look = time.monotonic(), stats.get(LOOK)
        last = self._seen.get(replica.replica_id)
        if last is None or last[0] != look:
            last = (look, now)
            self._seen[replica.replica_id] = last
            if len(self._seen) > 2 * len(self._replicas) + 16:  # of replicas that have gone
                self._seen = {key: self._seen[key] for key in self._seen if key in self._replicas}
        if now - last[1] > self._stale_s:
            return math.inf
        found = seconds.get(model)
        if not isinstance(found, (int, float)) or isinstance(found, bool):
            return math.inf
        return float(found) if math.isfinite(found) and found >= 0 else math.inf


def _two_choices(ranks: list[list[RunningReplica]]) -> list[list[RunningReplica]]:
    """Put two replicas of each rank, drawn by chance, before its others.

    Ray asks all of a rank for the length of their queues, and takes the first of equal ones.
    """
    chosen: list[list[RunningReplica]] = []
    for rank in ranks:
        shuffled = random.sample(rank, len(rank))
        chosen += [part for part in (shuffled[:2], shuffled[2:]) if part]
    return chosen


def node_seconds(
    path: str | PathLike[str], *, speeds: Speeds | None = None, timeout: float = 30.0
) -> dict[str, float | None]:
    """Ask each node of the cluster how long a load of a model would take there.

    Args:
        path: of the model, the same on each node.
        speeds: what is known of the nodes' speeds.
        timeout: seconds that the nodes have.

    Returns:
        Seconds by Ray's node id; None for a node that has no such model or does not answer.
    """
    looking = {}
    for node in ray.nodes():
        if node["Alive"]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=0, max_retries=0)(_look)
            looking[node["NodeID"]] = remote.options(scheduling_strategy=strategy).remote(
                str(path), speeds
            )
    done, _ = ray.wait(list(looking.values()), num_returns=len(looking), timeout=timeout)
    finished = set(done)
    seconds: dict[str, float | None] = {}
    for name, reference in looking.items():
        seconds[name] = None
        if reference in finished:
            try:
                seconds[name] = ray.get(reference)
            except ray.exceptions.RayError:  # the node has died meanwhile
                continue
    return seconds


def warm_nodes(seconds: Mapping[str, float | None], *, alike: float = ALIKE) -> dict[str, Any]:
    """Return ray_actor_options that start replicas on the nodes that load the model soonest.

    It is decided when the deployment is: what autoscaling starts later follows the same list.

    Args:
        seconds: what node_seconds() says.
        alike: nodes within this factor of the fastest one are taken.

    Returns:
        label_selector and fallback_strategy: any node does when these are full or gone.  Empty
        where nothing is known, or no node is better than another.
    """
    known = {name: value for name, value in seconds.items() if value is not None}
    fastest = min(known.values(), default=0.0)
    chosen = sorted(name for name, value in known.items() if value <= fastest * alike)
    if not chosen or len(chosen) == len(seconds):
        return {}
    return {
        "label_selector": {"ray.io/node-id": f"in({','.join(chosen)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def _look(path: str, speeds: Speeds | None) -> float | None:
    try:
        found: Iterable[Any] = NodeWatch([path], speeds=speeds, ask=_ask).scores().models
    except PagecacheError:
        return None
    return next((model.seconds for model in found), None)


def _ask(path: Any) -> int | None:
    """Ask the controller of this node, where one runs, for files of other users."""
    from pagecache_bpf.loads.through_controller import residency_or_none

    return residency_or_none(path)
