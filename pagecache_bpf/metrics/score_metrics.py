# SPDX-License-Identifier: Apache-2.0
"""The gauges of the placement scores; declarations.py puts them beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pagecache_bpf.metrics.collect import StatsSnapshot
from pagecache_bpf.placement.load_score import ModelScore

_Read = Callable[[StatsSnapshot | None], Iterator[tuple[Sequence[str], float]]]
CONTENT = "what the model is, the same on every node whatever its path: see docs/cluster.md"


def _of_scores(value: Callable[[ModelScore], float | None]) -> _Read:
    """Read a number of each scored model; none where it is not known."""

    def read(snapshot: StatsSnapshot | None) -> Iterator[tuple[Sequence[str], float]]:
        for model in snapshot.scores.models if snapshot and snapshot.scores else ():
            number = value(model)
            if number is not None:
                yield (model.model, model.content), number

    return read


def _budget(snapshot: StatsSnapshot | None) -> Iterator[tuple[Sequence[str], float]]:
    if snapshot and snapshot.scores and snapshot.scores.free_budget_bytes is not None:
        yield (), snapshot.scores.free_budget_bytes


#: Name, text, labels, and how it is read.
GAUGES: tuple[tuple[str, str, tuple[str, ...], _Read], ...] = (
    (
        "load_seconds",
        "Time that a load of the model would take on this node now, at best",
        ("model", "content"),
        _of_scores(lambda model: model.seconds),
    ),
    (
        "cold_load_seconds",
        "The same with nothing of the model in the page cache",
        ("model", "content"),
        _of_scores(lambda model: model.cold_seconds),
    ),
    ("free_budget_bytes", "Bytes that this node may still cache", (), _budget),
)
