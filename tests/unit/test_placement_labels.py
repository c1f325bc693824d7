# SPDX-License-Identifier: Apache-2.0
"""Labels of nodes: few, coarse, seldom written; exact by simulated time."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.placement.labels import LabelChange, LabelPlan, bucket_of, label_key
from pagecache_bpf.placement.load_score import ModelScore, NodeScores
from pagecache_bpf.placement.node_labels import NfdFile, expired, timestamp

SIZE = 1000


def node(**shares: int) -> NodeScores:
    """A node with so many thousandths of each model cached."""
    models = tuple(ModelScore(name, name, SIZE, share, 1e9, 1e10) for name, share in shares.items())
    return NodeScores("n", 0, 0, None, (), models)


def started(name: str = "n", **options: float) -> tuple[LabelPlan, float]:
    """A plan after its first interval, and the time of its next turn."""
    plan = LabelPlan(name, **options)  # type: ignore[arg-type]
    assert plan.update(0.0, node(a=1000)) is None
    return plan, plan.phase + plan.interval


@pytest.mark.parametrize(
    ("percent", "before", "value"),
    [
        *((0, 0, 0), (14, 0, 0), (15, 0, 10), (37, 0, 30), (99, 0, 90), (100, 0, 90)),
        *((35, 40, 40), (34, 40, 30), (54, 40, 40), (55, 40, 50), (100, 90, 90), (84, 90, 80)),
        *((9, 10, 10), (4, 10, 0)),
    ],
)
def test_buckets_have_hysteresis(percent: int, before: int, value: int) -> None:
    assert bucket_of(percent / 100 + 1e-9 if percent < 100 else 1.0, before) == value


def test_a_share_at_an_edge_writes_once() -> None:
    plan, now = started()
    writes = []
    for turn in range(50):
        change = plan.update(now + turn * 60, node(a=495 if turn % 2 else 505))
        writes += [turn] if change else []
    # The first one, and renewals when half of the ten minutes is over.
    assert writes == list(range(0, 50, 5))


def test_labels_come_and_go() -> None:
    plan, now = started()
    first = plan.update(now, node(a=800, b=50))
    assert first == LabelChange({label_key("a"): "80"}, (), now + 600)
    assert plan.update(now + 59, node(a=100)) is None  # not yet its turn
    second = plan.update(now + 60, node(a=0, b=900))
    assert second is not None
    assert second.values == {label_key("b"): "90"} and second.gone == (label_key("a"),)
    assert plan.update(now + 120, node(b=900)) is None
    last = plan.update(now + 180, node())
    assert last is not None and last.values == {} and last.gone == (label_key("b"),)
    assert plan.update(now + 3600, node()) is None  # nothing to renew


def test_what_could_not_be_published_is_tried_again() -> None:
    plan, now = started()
    change = plan.update(now, node(a=800))
    assert change is not None
    plan.failed(change)
    again = plan.update(now + 60, node(b=500))
    assert again is not None
    assert again.values == {label_key("b"): "50"} and again.gone == (label_key("a"),)


def test_labels_of_an_earlier_process_go() -> None:
    plan = LabelPlan("n")
    plan.adopt({label_key("old"): "70", "kubernetes.io/os": "linux", label_key("odd"): "x"})
    plan.update(0.0, node())
    change = plan.update(plan.phase + 60, node(a=500))
    assert change is not None
    assert change.gone == (label_key("odd"), label_key("old"))


def test_their_number_is_bounded() -> None:
    plan, now = started(most=2)
    change = plan.update(now, node(a=300, b=900, c=500))
    assert change is not None and set(change.values) == {label_key("b"), label_key("c")}
    # One that has a label keeps it against one with a little more.
    assert plan.update(now + 60, node(a=510, b=900, c=500)) is None
    change = plan.update(now + 120, node(a=900, b=900, c=500))
    assert change is not None and set(change.values) == {label_key("a"), label_key("b")}


def test_a_thousand_nodes_write_less_than_fifty_times_a_second() -> None:
    """All started at once, and everything changes at every look: the worst that there can be."""
    chance = random.Random(7)
    plans = [LabelPlan(f"node-{number}") for number in range(1000)]
    writes: Counter[int] = Counter()
    turns: list[list[float]] = [[] for _ in plans]
    for look in range(41):
        for number, plan in enumerate(plans):
            now = look * 15.0 + number * 0.015
            if plan.update(now, node(a=chance.randrange(1001), b=chance.randrange(1001))):
                writes[int(now)] += 1
                turns[number].append(now)
    assert max(writes.values()) < 50
    minutes = 41 * 15 / 60
    assert 1000 * (minutes - 3) < sum(writes.values()) <= 1000 * minutes
    # Each node once in a turn of a minute, and never in the first one.
    assert max(len(times) for times in turns) <= minutes
    assert min(min(times) for times in turns if times) > 0


def test_the_file_of_node_feature_discovery(tmp_path: Path) -> None:
    """As NFD's documentation has it: directives, then NAMESPACE/NAME=VALUE, in one piece."""
    file = NfdFile(tmp_path)
    file.publish(LabelChange({label_key("93f0c2a1b7d45e68"): "70"}, (), 1_796_000_000.9))
    (path,) = tmp_path.iterdir()  # nothing else is left behind
    assert not path.name.startswith(".")
    assert path.read_text().splitlines() == [
        "# +expiry-time=2026-11-30T00:53:20Z",
        "pagecache-bpf.io/93f0c2a1b7d45e68=70",
    ]
    file.publish(LabelChange({}, (), 0.0))
    assert path.read_text() == "# +expiry-time=1970-01-01T00:00:00Z\n"
    with pytest.raises(PagecacheError, match="cannot be published"):
        NfdFile(tmp_path / "none").publish(LabelChange({}, (), 0.0))


def test_keys_and_values_are_what_kubernetes_takes() -> None:
    """The syntax of labels: a name of at most 63 characters, and values of the same kind."""
    prefix, _, name = label_key("93f0c2a1b7d45e68").partition("/")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", prefix)
    assert len(name) <= 63 and re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", name)


def test_labels_expire_by_their_annotation() -> None:
    labels = {label_key("a"): "70", "kubernetes.io/os": "linux"}
    ends = {"pagecache-bpf.io/labels-expire": timestamp(1000)}
    assert expired(labels, ends, 1000.0) == []
    assert expired(labels, ends, 1001.0) == [label_key("a")]
    assert expired(labels, {}, 1e12) == []  # NFD's, which expires them itself
    assert expired(labels, {"pagecache-bpf.io/labels-expire": "soon"}, 1e12) == []
