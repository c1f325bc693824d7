# SPDX-License-Identifier: Apache-2.0
"""Snapshots: how they are put together, what happened between two, what watch and stats print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.cli import views
from pagecache_bpf.cli.verbs import stats as stats_verb
from pagecache_bpf.cli.verbs import watch
from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.abi import OBSERVED
from pagecache_bpf.kernel.control_device import PolicyStatus, Tag
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.metrics import collect
from pagecache_bpf.policy import engines
from tests.unit.command import NOBODY, ROOT, Result, environment, run, undocumented
from tests.unit.snapshots import GGUF, LLAMA, counters, snapshot

KEY = (LLAMA, "sequential", "agent")


def fake(*words: str, **changes: Any) -> Result:
    """Run a command that sees the snapshots of tests.unit.snapshots."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.snapshots", *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=60,
        **changes,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_ratios() -> None:
    model = snapshot().models[0]
    hits = model.counters["read_hit_bytes"] + model.counters["mmap_hit_bytes"]
    wanted = model.counters["read_bytes"] + model.counters["mmap_bytes"]
    assert (model.accessed_bytes, model.hit_ratio) == (wanted, hits / wanted)
    assert model.stall_seconds == (
        (model.counters["read_stall_ns"] + model.counters["mmap_stall_ns"]) / 1e9
    )
    assert snapshot().models[1].hit_ratio is None


def test_rates() -> None:
    before, after = snapshot(1000), snapshot(3000, after_ns=500_000_000)
    rates = collect.rates(before, after)
    change = counters(2000)
    assert rates[KEY].accessed == (change["read_bytes"] + change["mmap_bytes"]) / 0.5
    assert rates[KEY].added == change["added_bytes"] / 0.5
    stalled = change["read_stall_ns"] + change["mmap_stall_ns"]
    assert rates[KEY].stalled == pytest.approx(stalled / 1e9 / 0.5)
    assert rates[KEY].hit_ratio == pytest.approx(after.models[0].hit_ratio)
    idle = rates["cold", "sequential", "agent"]
    assert (idle.accessed, idle.hit_ratio) == (0, None)


def test_counters_that_begin_anew_count_from_zero() -> None:
    before, after = snapshot(5000), snapshot(1000, after_ns=10**9)
    assert collect.rates(before, after)[KEY].added == counters(1000)["added_bytes"]
    assert (
        collect.rates(replace(before, models=()), after)[KEY].added
        == (counters(1000)["added_bytes"])
    )
    # the clock was set back
    assert collect.rates(after, replace(before, time_ns=0))[KEY].added > 0


def test_one_model() -> None:
    only = collect.only(snapshot(), GGUF)
    assert [model.model for model in only.models] == [GGUF]
    assert [policy.name for policy in only.policies] == ["noop"]
    with pytest.raises(UsageError, match="no file of a model nope"):
        collect.only(snapshot(), "nope")


def observed_row(**changes: Any) -> dict[str, Any]:
    """A model as the agent's process answers; pagecache_bpf.observer has the shape."""
    return {
        "model": LLAMA,
        "policy": "sequential",
        "engine": "agent",
        "files": 4,
        "gone": 0,
        "bytes": 1 << 30,
        "resident_bytes": 1 << 20,
        "resident_by_node": {"0": 1 << 20},
        "since_ns": 17,
        "counters_before": counters(1),
        "counters": counters(3),
        "consumers": [
            {"tgid": 1, "comm": "cat", "alive": True}
            | {"counters_before": counters(1), "counters": counters(3)},
            # It has read nothing since the model was tagged.
            {"tgid": 2, "comm": "old", "alive": True}
            | {"counters_before": counters(3), "counters": counters(3)},
        ],
        **changes,
    }


class _Engine:
    """What a Engines asks of the module, or of the agent."""

    def __init__(self, policies: list[PolicyStatus], tags: list[Tag], **answers: Any) -> None:
        self._policies, self._tags, self._answers = policies, tags, answers

    def policies(self) -> list[PolicyStatus]:
        return self._policies

    def tags(self) -> list[Tag]:
        return self._tags

    def details(self) -> dict[str, Any]:
        return dict(self._answers["details"])

    def stats(self) -> dict[str, Any]:
        return dict(self._answers["stats"])

    def request(self, operation: str) -> dict[str, Any]:
        assert operation == "clients"
        return {"clients": [], "health": {"connections": 1}}


def status(name: str) -> PolicyStatus:
    return PolicyStatus(name, 17, 2, 3, ("readahead",), 1, 5, 6, {"drop_calls": 4})


def both_engines(monkeypatch: pytest.MonkeyPatch, module: Any, agent: Any) -> None:
    def policies() -> Any:
        for name, engine in (("struct_ops", module), ("agent", agent)):
            if engine:
                yield from ((name, policy) for policy in engine.policies())

    monkeypatch.setattr(collect, "replays", lambda *_: [])
    both = SimpleNamespace(module=module, agent=agent, policies=policies)
    monkeypatch.setattr(engines, "Engines", lambda: nullcontext(both))


def test_both_engines_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tag = Tag(8, 1, 99, 0, "noop", GGUF, 1, "/gone", True, 5)
    inactive = replace(tag, active=False, model="inactive")
    answer = {
        **{"level": "degraded", "missing": ["x"], "lost_events": 2, "models": [observed_row()]},
        "uncounted": ["read_hit_bytes"],
    }
    details = {"sequential": {"lost": 6, "errors": {"5": 1}}, "quitter": {"ended": True}}
    both_engines(
        monkeypatch,
        _Engine([status("noop")], [tag, inactive]),
        _Engine([status("sequential")], [], details=details, stats=answer),
    )
    found = collect.take()
    assert found.engines == {"struct_ops": True, "agent": True}
    assert found.observer == collect.ObserverState("degraded", ("x",), 2, ("read_hit_bytes",))
    noop, sequential, quitter = found.policies
    assert (noop.engine, noop.lost_requests, noop.counters) == ("struct_ops", 0, {"drop_calls": 4})
    assert noop.governed_bytes == 2 * PAGE_SIZE
    assert (noop.kept_bytes, noop.keep_max_bytes) == (5 * PAGE_SIZE, 6 * PAGE_SIZE)
    assert (sequential.lost_requests, sequential.read_errors) == (6, {5: 1})
    assert quitter.ended
    llama, gguf = found.models
    assert llama.observed and [consumer.comm for consumer in llama.consumers] == ["cat"]
    # People see what has been counted since the model was tagged, Prometheus all of it.
    assert llama.since_ns == 17
    assert llama.counters["read_bytes"] == counters(3)["read_bytes"] - counters(1)["read_bytes"]
    assert llama.totals["read_bytes"] == counters(3)["read_bytes"]
    # what cannot be counted is not told to be 0
    assert set(counters(1)) - set(llama.counters) == {"read_hit_bytes"}
    assert llama.resident_by_node == {"0": 1 << 20}
    assert (gguf.model, gguf.observed, gguf.counters) == (GGUF, False, {})
    assert (gguf.files, gguf.bytes, gguf.resident_bytes) == (1, 0, 5 * PAGE_SIZE)


def test_a_model_of_the_module_that_is_observed_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tag = Tag(8, 1, 99, 0, "noop", GGUF, 1, "/gone", True, 5)
    row = observed_row(
        model=GGUF, policy="noop", engine="struct_ops", resident_by_node="unknown", consumers=[]
    )
    answer = {
        **{"level": "full", "missing": [], "uncounted": [], "lost_events": 0},
        "models": [row],
    }
    module = _Engine([status("noop")], [tag])
    both_engines(monkeypatch, module, _Engine([], [], details={}, stats=answer))
    (model,) = collect.take().models
    assert model.observed and model.resident_by_node == {}


def test_without_engines_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    both_engines(monkeypatch, None, None)
    found = collect.take()
    assert found.engines == {"struct_ops": False, "agent": False}
    assert (found.observer, found.policies, found.models) == (None, (), ())


# --- the commands ---

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@root_only
def test_stats_in_json_is_documented() -> None:
    shown = fake("stats", "--json")
    assert shown.code == 0
    assert not undocumented(shown.data, stats_verb.JSON["stats"])
    llama = shown.data["models"][0]
    assert set(llama["counters"]) == {counter.name for counter in OBSERVED}
    assert 0 < llama["hit_ratio"] < 1
    assert shown.data["policies"][2]["state"] == "ended"


@root_only
def test_stats_for_people() -> None:
    shown = fake("stats").out
    assert LLAMA in shown and "node 1: 30.0 MiB" in shown
    assert "python3 (4711)" in shown and "cat (4712, ended)" in shown
    assert "5 events lost" in shown and "Input/output error" in shown
    assert "not observed" in shown
    assert "prefetch_wasted_bytes" not in shown
    assert "prefetch_wasted_bytes" in fake("stats", "-v").out
    assert LLAMA not in fake("stats", "--model", GGUF).out
    assert fake("stats", "--model", "nope").code == 2


@root_only
def test_watch_prints_lines_of_json() -> None:
    shown = fake("watch", "--interval", "0.1", "--count", "3", "--json")
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert (shown.code, len(lines)) == (0, 4)
    assert not any(undocumented(line, watch.JSON["watch"]) for line in lines)
    assert [bool(line["models"][0]["rates"]) for line in lines] == [False, True, True, True]
    assert [line["models"][2]["rates"] for line in lines] == [None] * 4
    times = [line["time_ns"] for line in lines]
    assert all(later - earlier >= 0.05e9 for earlier, later in pairwise(times))


@root_only
def test_watch_for_people() -> None:
    lines = fake("watch", "--interval", "0.1", "--count", "1").out.splitlines()
    assert all(column.title in lines[0] for column in views.COLUMNS)
    assert len(lines) == 1 + 2 * 3
    assert lines[4].split()[1] == LLAMA and "MB/s" in lines[4]
    assert {len(line) for line in lines[1:]} == {len(lines[0])}
    one = fake("watch", "--interval", "0.1", "--count", "1", "--model", GGUF).out
    assert GGUF in one and LLAMA not in one
    assert views.NOTHING in fake("watch", "--count", "1", "--interval", "0.1", "--model", "x").out


@root_only
def test_watch_ends_with_its_reader() -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -m tests.unit.snapshots watch --interval 0.1 | head -n 3",
        ],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=60,
    )
    assert len(done.stdout.splitlines()) == 3 and done.stderr == ""


@pytest.mark.parametrize("interval", ["0", "0.01", "nan", "inf", "-1", "1s", "", "100000"])
def test_bad_intervals(interval: str) -> None:
    failed = run("watch", f"--interval={interval}")
    assert failed.code == 2 and "is not an interval" in failed.err


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "x"])
def test_bad_counts(count: str) -> None:
    failed = run("watch", f"--count={count}")
    assert failed.code == 2 and "is not a count" in failed.err


@pytest.mark.parametrize("words", [["stats"], ["watch"], ["export"]], ids=lambda words: words[0])
def test_only_root_reads_the_counters(words: list[str]) -> None:
    failed = run(*words, rights=NOBODY)
    assert failed.code == 4 and "only root can read the counters" in failed.err


def test_percentages_are_not_rounded_to_all_or_nothing() -> None:
    shown = {
        0.0: "0.0%",
        1.0: "100.0%",
        0.99999: ">99.9%",
        1e-9: "<0.1%",
        0.5: "50.0%",
        2: "200.0%",
    }
    assert {value: views.percent(value) for value in shown} == shown
    assert views.percent(None) == "-"
