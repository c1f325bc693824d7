# SPDX-License-Identifier: Apache-2.0
"""load(prefetch=True) and `run --prefetch`: the files are read before anybody asks for them.

Nothing else serves these loads, so what cachestat(2) finds was read by this.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path

import pytest

import pagecache_bpf as pc
from pagecache_bpf.agent import worker
from pagecache_bpf.loads import open_load
from pagecache_bpf.loads.begin import UnservedLoad
from pagecache_bpf.loads.residency_snapshot import CHUNK
from tests.unit.command import run
from tests.unit.test_api import FILES, TOTAL, model, resident, wait_for

__all__ = ["model"]  # a fixture


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing serves a load."""
    monkeypatch.setattr(
        open_load, "begin", lambda request, *_: UnservedLoad(request.blank("none", "none", "test"))
    )


@pytest.mark.usefixtures("unserved")
def test_files_are_read_without_a_reader_and_go_at_the_end(model: Path) -> None:
    before = sorted(model.iterdir())[1]
    before.read_bytes()
    with pc.load(model, prefetch=True) as load:
        wait_for(lambda: resident(model) >= TOTAL, "all of the model to be read")
        wait_for(lambda: load.report().early_bytes == TOTAL, "the report to say so")
        assert "read from its beginning on" in str(load.report())
    assert resident(model) == resident(before) > 0  # what was there before stays
    assert load.report().early_bytes == TOTAL


@pytest.mark.usefixtures("unserved")
def test_nothing_is_read_early_unless_that_is_asked_for(model: Path) -> None:
    with pc.load(model) as load:
        assert load.ready(20)
    assert load.report().early_bytes is None and resident(model) == 0


@pytest.mark.usefixtures("unserved")
def test_a_budget_bounds_it(model: Path) -> None:
    with pc.load(model, prefetch=True, budget=CHUNK) as load:
        wait_for(lambda: load.report().early_bytes == CHUNK, "a chunk to be read")
        assert resident(model) == CHUNK


def test_it_reads_nothing_where_all_is_switched_off(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGECACHE_BPF_API", "off")
    with pc.load(model, prefetch=True) as load:
        assert load.ready(20)
    assert load.report().early_bytes is None and resident(model) == 0


@pytest.mark.usefixtures("unserved")
def test_it_ends_with_the_load(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    read = worker.by_populate

    def slow(fd: int, start: int, length: int) -> None:
        begun.set()
        assert go_on.wait(20)
        read(fd, start, length)

    monkeypatch.setattr(worker, "by_populate", slow)
    load = pc.load(model, prefetch=True)
    assert begun.wait(20)
    threading.Timer(0.2, go_on.set).start()
    last = load.done()
    early = last.early_bytes
    assert early is not None and early < TOTAL, "it was not told to give up"
    assert resident(model) == 0, "what it has read stays"
    assert not [found for found in threading.enumerate() if "early" in found.name]


def test_run_reads_while_the_command_starts(model: Path) -> None:
    look = (
        "import os, sys, time, pagecache_bpf as pc\n"
        "end = time.monotonic() + 20\n"
        "while (pc.residency(sys.argv[1]).resident_bytes or 0) < int(sys.argv[2]):\n"
        "    assert time.monotonic() < end, 'it is not read'\n"
        "    time.sleep(0.01)\n"
        "time.sleep(1)\n"  # the thread that reads may not have counted all of it yet
    )
    words = ("run", "--json", "--prefetch", "--weights", str(model), "--")
    done = run(*words, sys.executable, "-c", look, str(model), str(TOTAL))
    assert done.code == 0, done.err
    (report,) = json.loads(done.err.splitlines()[-1])["reports"]
    assert (report["files"], report["early_bytes"]) == (FILES, TOTAL)
    assert resident(model) == 0


@pytest.mark.usefixtures("unserved")
def test_a_second_load_of_the_same_files_says_that_it_did_not_get_it(model: Path) -> None:
    with pc.load(model) as first, pc.load(model, prefetch=True) as second:
        assert first.ready(20) and second.ready(20)
        assert dataclasses.asdict(second.report())["notes"]
