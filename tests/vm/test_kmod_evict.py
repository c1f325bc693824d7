# SPDX-License-Identifier: Apache-2.0
"""The hooks evict and pressure: what a policy may keep, what goes first, and who wins in the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cachestat import drop
from pagecache_bpf import _abi
from pagecache_bpf.device import Device, ExitRecord
from tests.vm.kernel import PAGE_SIZE, attached, resident, test_policy, wait_for
from tests.vm.memory import Group, fill, group, lru

pytestmark = pytest.mark.vm

MIB = 1 << 20
LIMIT = 48
GOVERNED = 16
STREAM = 96
PAGES = GOVERNED * MIB // PAGE_SIZE


@pytest.fixture(params=["classic", "generations"])
def lists(request: pytest.FixtureRequest) -> Iterator[str]:
    with lru(request.param):
        yield request.param


@pytest.fixture
def memory() -> Iterator[Group]:
    with group("pcbevict", max=LIMIT * MIB) as it:
        yield it


@pytest.fixture(scope="module")
def kept_files() -> dict[str, Path]:
    return {}


@pytest.fixture
def files(mount: Path) -> tuple[Path, Path]:
    """What is governed, and a stream that is twice the cgroup's limit."""
    return fill(mount / "weights", GOVERNED), fill(mount / "stream", STREAM)


def last_exit(policy: str) -> ExitRecord | None:
    with Device() as device:
        record = list(device.exits())[-1:]
    return record[0] if record and record[0].policy == policy else None


def test_default_loses_what_keep_keeps(
    lists: str, memory: Group, files: tuple[Path, Path]
) -> None:
    weights, stream = files
    memory.read(weights, stream)
    assert resident(weights) < PAGES // 10
    drop(files)
    with attached(test_policy("keep_all"), weights) as policy:
        memory.read(weights, stream, stream)
        print(lists, resident(weights), policy.status, [bin(x) for x in policy.variable("priority_seen")])
        assert resident(weights) >= PAGES * 99 // 100
        assert policy.status.kept_pages >= PAGES * 99 // 100
        assert policy.count("kept_bytes") >= policy.status.kept_pages * PAGE_SIZE
        words = policy.variable("last")
        seen = _abi.pagecache_ctx.from_buffer_copy(b"".join(w.to_bytes(8, "little") for w in words))
        assert (seen.cgroup_id, seen.nr, seen.node) == (memory.id, 1, 0)
        assert policy.variable("kinds_seen") == [1 << _abi.Kind.CGROUP]
        drop([weights])
        wait_for(lambda: policy.status.kept_pages == 0, "nothing kept of an empty cache")
    assert memory.events("oom_kill") == 0


def test_keep_ends_at_the_budget(lists: str, memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    budget = PAGES // 4
    with attached(test_policy("keep_all"), weights, keep_pages=budget) as policy:
        memory.read(weights, stream, stream)
        print(lists, resident(weights), policy.status)
        assert policy.variable("granted") == [budget]
        assert policy.status.keep_max_pages == budget
        assert budget * 9 // 10 <= policy.status.kept_pages <= budget
        assert budget * 9 // 10 <= resident(weights) <= budget + PAGES // 10
        assert policy.count("keep_over_budget_bytes") > 0


def test_a_file_too_big_to_keep(lists: str, memory: Group, files: tuple[Path, Path]) -> None:
    """Everything there is belongs to a policy that keeps it all: reads go on."""
    _, stream = files
    with attached(test_policy("keep_all"), stream) as policy:
        memory.read(stream, stream)
        print(lists, policy.status)
        assert policy.count("keep_overruled_bytes") > 0
        assert policy.count("keep_ignored_bytes") >= policy.count("keep_overruled_bytes")
    assert memory.events("oom_kill") == 0


def test_keep_yields_to_whoever_needs_memory(
    lists: str, memory: Group, files: tuple[Path, Path]
) -> None:
    """No OOM kill that the default does not have."""
    weights, stream = files
    with attached(test_policy("keep_all"), weights, stream) as policy:
        memory.read(stream)
        assert memory.allocate(LIMIT * 3 // 4) == 0
        print(lists, policy.status)
        assert policy.count("keep_overruled_bytes") > 0
        memory.read(stream)
    assert memory.events("oom_kill") == 0


def test_evict_now(lists: str, memory: Group, files: tuple[Path, Path]) -> None:
    weights, stream = files
    with attached(test_policy("evict_all"), weights, stream) as policy:
        memory.read(weights, stream)
        assert resident(weights) < PAGES // 10
        assert policy.count("evicted_now_bytes") > STREAM * MIB // 3
        assert policy.status.kept_pages == 0
