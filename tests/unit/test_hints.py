# SPDX-License-Identifier: Apache-2.0
"""Maps for user space: found in the object, written by name, wrong use refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pagecache_bpf.cli.verbs import hint
from pagecache_bpf.errors import UsageError
from pagecache_bpf.policy.catalog import discover, find
from pagecache_bpf.policy.hint_maps import (
    HintMap,
    broken_promises,
    cgroup_id_of,
    find_map,
    gauges_of,
    maps_of,
    resolve,
)


def the_map(policy: str, name: str) -> HintMap:
    return find_map(policy, maps_of(find(policy)), name)


def test_what_is_marked_is_found_and_nothing_else() -> None:
    assert [(hint_map.name, hint_map.kind) for hint_map in maps_of(find("multiplex"))] == [
        ("plans", "hint"),
        ("scores", "report"),
        ("consumers", "hint"),
    ]
    assert [hint_map.name for hint_map in maps_of(find("sequential"))] == ["consumers"]
    plans = the_map("multiplex", "plans")
    assert [(f.name, f.offset, f.size) for f in plans.value] == [
        ("due_ns", 0, 8),
        ("mb_per_s", 8, 8),
    ]
    assert (plans.key_size, plans.max_entries) == (4, 1024)
    assert HintMap.from_json(plans.as_json()) == plans


def test_every_hint_of_a_shipped_policy_says_what_for() -> None:
    for info in discover():
        for hint_map in maps_of(info):
            assert hint_map.help and hint_map.key and hint_map.value, (
                f"{info.name}: {hint_map.name}"
            )
        known = {gauge.name for gauge in gauges_of(info)}
        for gauge in gauges_of(info):
            assert gauge.help and gauge.unit and (not gauge.at_least or gauge.at_least in known)


def test_bytes_and_numbers() -> None:
    hot = the_map("pin", "hot")
    key = hot.encode_key({"ino": 7, "dev_major": 8, "dev_minor": 1, "generation": 3, "piece": 2})
    assert hot.decode(key, hot.encode_value({"value": 1})) == {
        "key": {"ino": 7, "dev_major": 8, "dev_minor": 1, "generation": 3, "piece": 2},
        "value": {"value": 1},
    }
    plans = the_map("multiplex", "plans")
    old = plans.encode_value({"due_ns": 5, "mb_per_s": 6})
    changed = plans.decode(bytes(4), plans.encode_value({"due_ns": 9}, old))
    assert changed["value"] == {"due_ns": 9, "mb_per_s": 6}  # what is not given stays
    with pytest.raises(UsageError, match="does not fit value"):
        hot.encode_value({"value": 1 << 32})
    with pytest.raises(UsageError, match="no sign"):
        hot.encode_value({"value": -1})


def test_settings_are_sorted_into_key_and_value() -> None:
    hot = the_map("pin", "hot")
    assert hot.usage() == "file=... piece=... value=..."
    assert hot.split({"file": "w", "piece": 1, "value": 1}) == (
        {"file": "w", "piece": 1},
        {"value": 1},
    )
    for wrong in ({"piece": 1}, {"file": "w"}, {"file": "w", "piece": 1, "hue": 2}):
        with pytest.raises(UsageError, match="it takes file="):
            hot.split(wrong)


def test_names_stand_for_numbers() -> None:
    def numbers(**words: object) -> dict[str, int]:
        return resolve(words, {"llama": 4}.__getitem__, len, lambda _: {"ino": 9}, lambda: 1000)

    assert numbers(model="llama", cgroup_id="/a", file="x", due_ns="2us", n="0x10") == {
        "model": 4,
        "cgroup_id": 2,
        "ino": 9,
        "due_ns": 2000,
        "n": 16,
    }
    assert numbers(due_ns="+2us") == {"due_ns": 3000}
    assert numbers(model=7, due_ns=5) == {"model": 7, "due_ns": 5}
    with pytest.raises(UsageError, match="whole number"):
        numbers(piece="two")
    with pytest.raises(UsageError, match="not a duration"):
        numbers(due_ns="+soon")


def test_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has plans, scores, consumers"):
        the_map("multiplex", "plan")
    with pytest.raises(UsageError, match="it has consumers"):
        the_map("sequential", "plan")
    with pytest.raises(UsageError, match="no control group"):
        cgroup_id_of("/no/such/group")
    assert cgroup_id_of(str(tmp_path)) == tmp_path.stat().st_ino


def test_promises() -> None:
    gauges = gauges_of(find("pin"))
    assert broken_promises(gauges, {"promised_pages": 5, "pinned_pages": 5}) == []
    assert broken_promises(gauges, {"promised_pages": 5000, "pinned_pages": 4}) == [
        "pinned_pages is 4 pages, promised_pages 5,000"
    ]


@pytest.mark.parametrize(("width", "lines"), [(29, 4), (28, 7)])
def test_elements_too_wide_for_a_table_are_printed_below_each_other(width: int, lines: int) -> None:
    told = io.StringIO()
    elements = [{"model": model, "pages_per_s": 10**12 + model, "state": 1} for model in (1, 2)]
    hint.print_elements(Console(file=told, width=width, color_system=None), elements)
    for text in ("model", "pages_per_s", "state", "1000000000001", "1000000000002"):
        assert text in told.getvalue()
    assert len(told.getvalue().splitlines()) == lines
