# SPDX-License-Identifier: Apache-2.0
"""Engine `agent`: what it can do about eviction without a module."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.agent.pressure import PressureWatch, Short, ask_all
from pagecache_bpf.cli.verbs import hint, status
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.catalog import agent_object, find
from tests.unit.command import run, undocumented
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = 6 * 1024  # 24 MiB
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_agent() -> Iterator[None]:
    yield
    if agent_device.is_running():
        with agent_device.AgentDevice() as agent:
            for name in agent.details():
                agent.detach(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_file(tmp_path / "model.safetensors", PAGES)


def scan(path: Path, skip_mib: int = 0, count_mib: int = 0) -> None:
    """read() a file in another process, slowly enough for an agent on a busy machine."""
    command = ["dd", f"if={path}", "of=/dev/null", "bs=128k", f"skip={skip_mib * 8}"]
    command += [f"count={count_mib * 8}"] if count_mib else []
    subprocess.run(command, check=True, capture_output=True)


def attach(*words: str | Path) -> dict[str, object]:
    result = run("attach", "--engine", "agent", "--json", *words)
    assert result.code == 0, result.err
    data = result.data
    assert isinstance(data, dict)
    return data


def test_the_stream_is_dropped_behind_the_reader(file: Path) -> None:
    attach("cyclic", "--knob", "budget_mib=6", "--knob", "window_kib=0", file)
    scan(file)
    # The end of the file is never behind anyone.
    wait_for(lambda: 6 * 256 <= resident_pages(file) <= 10 * 256, "the fixed part and little more")
    data = run("status", "--json").data
    assert not undocumented(data, status.JSON["status"])
    (policy,) = data["policies"]
    assert policy["gauges"] == {"granted_pages": 6 * 256} and policy["alarms"] == []
    assert any("evict" in text for text in policy["not_honored"])
    assert policy["counters"]["removed_bytes"] >= 12 * MIB


def test_kv_files_leave_unless_they_are_wanted_soon(file: Path) -> None:
    attach("kvcache", "--knob", "budget_mib=16", file)
    for piece in range(8, 12):
        done = run("hint", "kvcache", "next_use", f"file={file}", f"piece={piece}", "due_ns=+9s")
        assert done.code == 0, done.err
    shown = run("hint", "kvcache", "next_use", "--json")
    assert not undocumented(shown.data, hint.JSON["hint"])
    assert {row["key"]["piece"] for row in shown.data["elements"]} == {8, 9, 10, 11}
    scan(file)
    wait_for(lambda: resident_pages(file) <= 6 * 256, "the rest to be dropped")
    before = resident_pages(file)
    assert before >= 4 * 256 - 64
    scan(file, 8, 4)
    # Now nobody has asked for these pieces any more: they go when the hint is taken back.
    for piece in range(8, 12):
        words = ["next_use", f"file={file}", f"piece={piece}", "--delete"]
        assert run("hint", "kvcache", *words).code == 0
    scan(file, 0, 1)
    scan(file, 8, 5)
    with file.open("rb") as opened:
        wait_for(
            lambda: cached_pages(opened.fileno(), 8 * MIB, 3 * MIB) == 0,
            "pieces without a hint to be dropped",
        )


def test_what_attach_says_is_not_done(file: Path) -> None:
    data = attach("pin", file)
    engine = data["engine"]
    assert isinstance(engine, dict)
    assert engine["not_honored"][0].startswith("the hook evict")
    run("detach", "pin")
    engine = attach("noop", file)["engine"]
    assert isinstance(engine, dict)
    assert not any(text.startswith("the hook evict") for text in engine["not_honored"])


def test_pinned_pages_are_read_again(file: Path) -> None:
    attach("pin", file)
    scan(file)
    assert resident_pages(file) == PAGES
    drop_half = PAGES // 2 * PAGE_SIZE
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, drop_half, os.POSIX_FADV_DONTNEED)
    wait_for(lambda: resident_pages(file) == PAGES, "the pages to be read again", 20)
    (policy,) = run("status", "--json").data["policies"]
    assert policy["gauges"] == {"promised_pages": PAGES, "pinned_pages": PAGES}


def test_pressure_takes_from_the_model_wanted_last(tmp_path: Path) -> None:
    near, far = (make_file(tmp_path / f"{name}.safetensors", 2048) for name in ("near", "far"))
    info = find("multiplex")
    with Agent(info, agent_object(info), {"idle_ms": 1}) as agent:
        for path in (near, far):
            with path.open("rb") as file:
                agent.tag(file.fileno(), path.stem, str(path))
            scan(path)
        assert resident_pages(near) == resident_pages(far) == 2048
        time.sleep(0.01)  # idle_ms: neither is in use now
        plans = agent.hints.maps[0]
        for model, due in ((1, time.monotonic_ns() + 10**9), (2, time.monotonic_ns() + 10**12)):
            agent.hints.write(
                plans.name,
                plans.encode_key({"model": model}),
                plans.encode_value({"due_ns": due}),
            )
        files = [agent._asker(tag) for tag in agent.tags.values()]
        assert ask_all(Short(0, 1024 * PAGE_SIZE), PAGE_SIZE, files) >= 1024
        wait_for(lambda: resident_pages(far) <= 1024, "half of the far model to be dropped")
        assert resident_pages(near) == 2048


def test_the_machine_tells_when_memory_is_short() -> None:
    watch = PressureWatch()
    assert not any("trigger" in text for text in watch.missing), watch.missing
    assert watch.check() == []
    watch.close()


def test_hints_that_make_no_sense(file: Path) -> None:
    attach("kvcache", file)
    for words, says in (
        (["next_use", "piece=1", "due_ns=+1s"], "it takes file="),
        (["next_use", f"file={file}", "piece=1", "color=3"], "has no member color"),
        (["next_use", f"file={file}", "piece=1", "due_ns=soon"], "not a duration"),
        (["next_use", f"file={file}", "piece=x", "due_ns=+1s"], "takes a whole number"),
        (["next_use", f"file={file}0", "piece=1", "due_ns=+1s"], "cannot be opened"),
        (["no_map"], "has no map"),
        (["next_use", f"file={file}", "piece=7", "--delete"], "no such key"),
    ):
        done = run("hint", "kvcache", *words)
        assert done.code == 2 and says in done.err, (words, done.err)
        assert "Traceback" not in done.err
    done = run("hint", "nothing")
    assert done.code == 2 and "is not attached" in done.err
    assert json.loads(run("hint", "kvcache", "--json").out)["maps"][0]["name"] == "next_use"
    drop([file])
