# SPDX-License-Identifier: Apache-2.0
"""Loads of the Python API beside each other: none waits for what another one waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pagecache_bpf as pc
from pagecache_bpf.loads import begin
from pagecache_bpf.loads.open_load import OpenLoad
from pagecache_bpf.loads.residency_snapshot import CHUNK
from tests.unit.test_api import SIZE, _unprivileged, model, resident

__all__ = ["_unprivileged", "model"]  # fixtures


def test_s16_a_second_load_with_other_wishes_is_told_apart(model: Path) -> None:
    with pc.load(model, budget=CHUNK) as first, pc.load(model, budget=2 * CHUNK) as second:
        assert first.report().notes == ()
        (note,) = second.report().notes
        assert "budget" in note and "not followed" in note
        with pc.load(model, budget=CHUNK) as third:
            assert third.report().notes == ()


@pytest.fixture
def slow_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whatever serves loads is not ready before the event is set."""
    go_on = threading.Event()
    by_threads = begin._by_threads

    def serve(request: Any, snapshot: Any, starting: Any, reasons: Any) -> Any:
        assert go_on.wait(60)
        starting.check()
        return by_threads(request, snapshot, starting, reasons)

    monkeypatch.setattr(begin, "_by_threads", serve)
    yield go_on
    go_on.set()


def test_s16_a_load_does_not_wait_for_what_serves_it(
    model: Path, slow_start: threading.Event
) -> None:
    """load() returns, is reported on and ends while what serves it is still being started."""
    shard = sorted(model.iterdir())[1]
    shard.read_bytes()
    load = pc.load(model)
    assert not load.ready(0)
    report = load.report()
    assert (report.engine, report.done) == ("none", False) and "being started" in report.why
    assert report.resident_before_bytes == resident(shard)
    for path in sorted(model.iterdir()):
        path.read_bytes()
    last = load.done()
    assert last.done and last.engine == "none" and "before anything was ready" in last.why
    # What the reader has brought in is gone, what was there before is not.
    assert resident(model) == resident(shard) >= SIZE
    slow_start.set()
    assert load.ready(20) and load.report() == last


def test_s16_reports_do_not_wait_for_another_load(model: Path, slow_start: threading.Event) -> None:
    with pc.load(model) as load:
        other = model / "model-0.safetensors"
        with pc.load(other):
            assert len(pc.report()) == 2 and not load.ready(0)
        slow_start.set()
        assert load.ready(20) and load.report().engine == "unprivileged"


def test_s16_nobody_waits_for_a_load_that_ends(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ending one may take seconds: it waits for what is being read."""
    ends, go_on = threading.Event(), threading.Event()
    finish = OpenLoad.finish

    def slowly(load: OpenLoad, keep: bool) -> None:
        if len(load.files) > 1:
            ends.set()
            assert go_on.wait(60)
        finish(load, keep)

    monkeypatch.setattr(OpenLoad, "finish", slowly)
    load = pc.load(model)
    told: list[int] = []

    def others() -> None:
        with pc.load(model / "model-0.safetensors"):
            told.append(len(pc.report()))

    threads = [threading.Thread(target=load.done), threading.Thread(target=others)]
    threads[0].start()
    assert ends.wait(60)
    threads[1].start()
    threads[1].join(20)
    assert told == [1]
    go_on.set()
    threads[0].join(60)
    assert load.report().done
