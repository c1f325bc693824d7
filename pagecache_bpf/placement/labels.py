# SPDX-License-Identifier: Apache-2.0
"""Residency as labels of a Kubernetes node: few, coarse, seldom changed, and expiring.

    pagecache-bpf.io/93f0c2a1b7d45e68=70

says that at least about 70% of the model with that content identity was in the node's page cache.
Every change of a label is a write to the API server's store, so there are bounds on all of it:

- values are multiples of BUCKET, and one changes only when the share is MARGIN past its bucket;
- a node has labels for at most `most` models, those with the most bytes cached, and none for a
  model of which less than a bucket is cached;
- a node writes at most once in `interval` seconds, all its changes together, at a moment that its
  name gives, so that the nodes of a cluster spread over the interval;
- labels that nobody renews expire after `ttl` seconds (see node_labels.py for how).

A cluster of n nodes thus writes at most n / interval times a second on average.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pagecache_bpf.placement.load_score import NodeScores

DOMAIN = "pagecache-bpf.io"
BUCKET = 10
MARGIN = 5
#: A model without a label needs that much more cached than one with a label to take its place.
_ADVANTAGE = 1.25


def label_key(content: str) -> str:
    """Return the key of the label for a model.

    Args:
        content: its content identity.

    Returns:
        DOMAIN/IDENTITY; names of models are no label keys, identities always are.
    """
    return f"{DOMAIN}/{content}"


def bucket_of(fraction: float, before: int = 0) -> int:
    """Return the value of a label.

    Args:
        fraction: share of the model in the page cache, 0 to 1.
        before: the value that is published; 0: none is.

    Returns:
        A multiple of BUCKET below 100, which is the last one: no share is far enough past 90 to
        leave it upwards.  0: no label.
    """
    percent = math.floor(100 * fraction)
    if before - MARGIN <= percent < before + BUCKET + MARGIN:
        return before
    return min(percent // BUCKET * BUCKET, 100 - BUCKET)


@dataclass(frozen=True)
class LabelChange:
    """What a node should publish now.

    values: of all its labels, by key.  gone: keys that it had published and that have to go.
    expires: when these are worth nothing any more, in seconds since 1970.
    """

    values: Mapping[str, str]
    gone: tuple[str, ...]
    expires: float


@dataclass
class LabelPlan:
    """Decides when a node publishes which labels.

    node: its name, which gives the moment.  interval, ttl: seconds; labels are renewed when half
    of ttl is over.  most: labels at a time.
    """

    node: str
    interval: float = 60.0
    ttl: float = 600.0
    most: int = 32
    _published: dict[str, int] = field(default_factory=dict)
    _written: float | None = None
    _turn_taken: int | None = None

    @property
    def phase(self) -> float:
        """When in each interval this node writes, in seconds from its start."""
        return zlib.crc32(self.node.encode()) / 2**32 * self.interval

    def adopt(self, labels: Mapping[str, str]) -> None:
        """Take labels of this node for its own, those of an earlier process.

        Args:
            labels: of the node, by key; others than ours are left alone.
        """
        for key, value in labels.items():
            domain, _, content = key.partition("/")
            if domain == DOMAIN:
                known = value.isascii() and value.isdigit() and len(value) < 3
                self._published[content] = int(value) if known else 0

    def update(self, now: float, scores: NodeScores) -> LabelChange | None:
        """Tell what to publish.

        Nothing is published in the interval of the first call: the processes of a whole cluster
        may have been started at once.

        Args:
            now: seconds since 1970, never less than in the call before.
            scores: of the node, now.

        Returns:
            What to publish, as if it will be published; None: nothing, or not yet.  Where it could
            not be published, failed() makes the next turn try again.
        """
        turn = math.floor((now - self.phase) / self.interval)
        if self._turn_taken is None:
            self._turn_taken = turn
        if turn <= self._turn_taken:
            return None
        wanted = self._wanted(scores)
        old = self._written is None or now - self._written >= self.ttl / 2
        if wanted == self._published and not (old and wanted):
            return None
        gone = tuple(sorted(label_key(name) for name in self._published.keys() - wanted.keys()))
        self._published, self._written, self._turn_taken = wanted, now, turn
        values = {label_key(name): str(value) for name, value in sorted(wanted.items())}
        return LabelChange(values, gone, now + self.ttl)

    def failed(self, change: LabelChange) -> None:
        """Take back that a change was published; what should have gone goes with the next one.

        Args:
            change: what update() returned.
        """
        for key in change.gone:
            self._published.setdefault(key.rpartition("/")[2], 0)
        for key in change.values:
            self._published[key.rpartition("/")[2]] = 0

    def _wanted(self, scores: NodeScores) -> dict[str, int]:
        """Return the value by content identity, for at most `most` models."""
        found = {}
        for model in scores.models:
            value = bucket_of(model.fraction, self._published.get(model.content, 0))
            if value:
                advantage = _ADVANTAGE if self._published.get(model.content) else 1.0
                found[model.content] = (model.fraction * model.bytes * advantage, value)
        kept = sorted(found, key=lambda name: (-found[name][0], name))[: self.most]
        return {name: found[name][1] for name in kept}
