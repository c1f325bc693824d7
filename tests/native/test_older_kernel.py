# SPDX-License-Identifier: Apache-2.0
"""On a kernel before 6.12, which has tracepoints of what enters and leaves the cache only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pagecache_bpf.explain import features
from pagecache_bpf.policy import agent_device
from tests.observing import PAGE_SIZE, reader, stream
from tests.unit.command import run
from tests.vm.kernel import make_file

pytestmark = pytest.mark.native

PAGES = 2039


@pytest.fixture(autouse=True)
def _older() -> None:
    if any(feature.ok for feature in features.probe() if feature.name == "access tracepoints"):
        pytest.skip("this kernel has all tracepoints: `make test-old` boots one that has not")


@pytest.mark.parametrize("policy", ["sequential", "maio", "noop", "mru"])
def test_a_policy_that_would_hear_of_no_reader_is_refused(tmp_path: Path, policy: str) -> None:
    file = make_file(tmp_path / "model.safetensors", 97)
    attach = run("attach", policy, file, "--engine", "agent", "--json")
    assert attach.code == 3 and not attach.out
    assert "nothing would call its hook" in attach.err and "mm_filemap_get_pages" in attach.err
    status = json.loads(run("status", "--json").out)
    assert status["policies"] == [] and run("tags").code == 0


def test_what_comes_and_goes_is_counted(tmp_path: Path) -> None:
    """Of a policy that is told of pages only, which has what it needs."""
    file = make_file(tmp_path / "model.safetensors", PAGES)
    attach = run("attach", "fifo", file, "--engine", "agent")
    assert attach.code == 0 and "lacking" in attach.out and "mm_filemap_fault" in attach.out
    try:
        reader(file, stream(), ["advise", 0, 0, os.POSIX_FADV_DONTNEED])
        stats = run("stats")
        assert stats.code == 0 and "the observer is degraded" in stats.out + stats.err
        with agent_device.AgentDevice() as agent:
            shown = agent.stats()
        (model,) = shown["models"]
        counted = model["counters"]
        assert counted["added_bytes"] == PAGES * PAGE_SIZE == counted["removed_bytes"]
        assert counted["evicted_fadvise_bytes"] == PAGES * PAGE_SIZE
        assert model["resident_bytes"] == 0
        assert not any(counted.get(name) for name in shown["uncounted"])
    finally:
        assert run("detach", "fifo").code == 0
