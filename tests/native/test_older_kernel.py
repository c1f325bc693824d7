# SPDX-License-Identifier: Apache-2.0
"""Readers on other kernels than this machine's: what tells of them, and that it is told right.

`make test-old` boots one.  Before 6.12 functions tell, in place of the missing tracepoints.  From
6.12 on functions can be asked for, where they take programs: PAGECACHE_BPF_EVENTS=function.  The
oracle is fincore(1), which asks mincore(2) or cachestat(2).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.cachestat import drop
from benchmarks.disks import device_reads, difference
from benchmarks.guest.runner import GUEST_ENV
from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel import event_sources
from pagecache_bpf.observer import Observer
from pagecache_bpf.policy import agent_device
from pagecache_bpf.policy.agent_device import AgentDevice
from pagecache_bpf.policy.catalog import agent_object, find, names
from tests.native.readahead import usual_readahead
from tests.observing import PAGE_SIZE, reader, stream, touch
from tests.unit.command import run
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES, HUGE_PAGES = 8191, 512
FUNCTIONS = {
    "mm_filemap_get_pages": "fexit/filemap_get_pages",
    "mm_filemap_map_pages": "fexit/filemap_map_pages",
    "mm_filemap_fault": "fentry/filemap_fault",
}
TRACEPOINTS = {name: f"raw_tp/{name}" for name in FUNCTIONS}


@pytest.fixture(autouse=True)
def sections() -> dict[str, str]:
    """What tells of readers here, by event."""
    sources = event_sources.sources_here()
    found = {name: sources[name].section for name in FUNCTIONS if name in sources}
    if found != FUNCTIONS and GUEST_ENV not in os.environ:
        pytest.skip("tracepoints tell here, or nothing: `make test-old` boots another kernel")
    assert found in (FUNCTIONS, TRACEPOINTS)
    return found


def has_folios() -> bool:
    """Tell whether this kernel has struct folio (5.16)."""
    return event_sources.has_type(Path("/sys/kernel/btf/vmlinux").read_bytes(), "folio")


def cached(path: Path) -> int:
    """Pages in the cache, as fincore(1) tells."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "PAGES", str(path)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@contextmanager
def governed(path: Path) -> Iterator[AgentDevice]:
    """The policy sequential on engine agent, governing a file of which nothing is cached."""
    info = find("sequential")
    agent_device.start()
    with AgentDevice() as agent:
        assert agent.attach(info, agent_object(info), {}) == []
        with path.open("rb") as file:
            agent.tag(file.fileno(), policy=info.name, model="test", path=str(path))
        drop([path])
        assert cached(path) == 0
        try:
            yield agent
        finally:
            agent.detach(info.name)


@pytest.mark.parametrize("how", [stream(), touch()], ids=["read", "mmap"])
def test_streams_are_read_ahead(
    tmp_path: Path, how: list[object], sections: dict[str, str]
) -> None:
    path = make_file(tmp_path / "model.safetensors", PAGES)
    with usual_readahead(path), governed(path) as agent:
        assert agent.details()["sequential"]["events"].items() >= sections.items()
        before = device_reads(path)
        process = reader(path, how)
        wait_for(lambda: next(iter(agent.policies())).inflight_pages == 0, "the queue to be empty")
        # Where a huge page is not read whole (before 5.18), none is read page by page either.
        reads = difference(before, device_reads(path))
        assert reads is not None and reads < PAGES // 8
        counters = next(iter(agent.policies())).counters
        assert counters["prefetch_bytes"] > 0.8 * PAGES * PAGE_SIZE
        assert counters["prefetch_issued_bytes"] > 0
        added = (counters["added_bytes"] - counters["removed_bytes"]) // PAGE_SIZE
        assert added in (PAGES, PAGES + 1)  # see test_every_policy_is_taken
        assert cached(path) == PAGES
        # What the reader wanted is each page, once.  Before 5.16 a few faults are counted twice,
        # and a huge page that a fault waits for is counted as the one page of that fault.
        shown = agent.stats()
        assert (shown["level"], shown["missing"]) == ("full", [])
        (model,) = shown["models"]
        (consumer,) = [found for found in model["consumers"] if found["tgid"] == process]
        wanted = "read" if how[0] == "stream" else "mmap"
        counted = consumer["counters"]
        pages = counted[f"{wanted}_bytes"] // PAGE_SIZE
        if how[0] == "touch" and not has_folios():
            assert PAGES <= pages <= 1.01 * PAGES
        elif how[0] == "touch":
            assert pages <= PAGES and (PAGES - pages) % (HUGE_PAGES - 1) == 0
        else:
            assert pages == PAGES
        parts = [counted[f"{wanted}_{part}_bytes"] for part in ("hit", "ahead", "miss")]
        # How much of it came in time, and who was faster, is the machine's affair.
        assert sum(parts) == pages * PAGE_SIZE and parts[0] + parts[1] > 0
        # A page that the reader was first to ask for is not prefetched.
        name = "prefetched_bytes"
        prefetched = model["counters"][name] - model["counters_before"][name]
        twice = 0 if has_folios() else 0.01 * PAGES * PAGE_SIZE
        assert parts[0] - twice <= prefetched <= counters["prefetch_issued_bytes"]


@pytest.mark.parametrize("name", names())
def test_every_policy_is_taken(tmp_path: Path, name: str, sections: dict[str, str]) -> None:
    """By a verifier that is stricter than those of newer kernels."""
    path = make_file(tmp_path / "model.safetensors", 97)
    info = find(name)
    with usual_readahead(path), Agent(info, agent_object(info)) as agent, path.open("rb") as file:
        assert agent.events.items() >= sections.items() and not agent.missing
        agent.tag(file.fileno(), "model", str(path))
        reader(path, stream())
        counters = agent.counters()
    # On 5.15 read() at the end of a file brings a page that lies behind it.
    assert counters["added_bytes"] // PAGE_SIZE in (97, 98)
    asked = {"access", "readahead"} & set(info.hooks)
    assert bool(counters["access_calls"] + counters["readahead_calls"]) == bool(asked)


def test_where_functions_take_no_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, str]
) -> None:
    """Forced here: what would hear of no reader is refused, what comes and goes is counted."""
    if event_sources.sources_here({event_sources.TRACEPOINT}).keys() & sections:
        pytest.skip("tracepoints tell here")
    monkeypatch.setenv(event_sources.VARIABLE, event_sources.TRACEPOINT)
    info = find("sequential")
    with pytest.raises(UnsupportedError, match="nothing would call its hook") as caught:
        Agent(info, agent_object(info))
    assert caught.value.exit_code == 3 and "mm_filemap_get_pages" in caught.value.why
    info = find("fifo")
    path = make_file(tmp_path / "model.safetensors", PAGES)
    with Agent(info, agent_object(info)) as agent, Observer() as observer, path.open("rb") as file:
        assert sorted(agent.missing) == sorted(sections) == observer.missing
        observer.tag(file.fileno(), "model", path=str(path))
        reader(path, stream(), ["advise", 0, 0, os.POSIX_FADV_DONTNEED])
        shown = observer.snapshot()
        (model,) = shown["models"]
        counted = model["counters"]
        assert shown["level"] == "degraded"
        assert counted["added_bytes"] // PAGE_SIZE in (PAGES, PAGES + 1)
        # The page behind the file's end that 5.15 brings goes as those of a shortened file do.
        behind = counted["evicted_truncate_bytes"]
        assert behind in ((0,) if has_folios() else (0, PAGE_SIZE))
        assert counted["added_bytes"] == counted["removed_bytes"]
        assert counted["evicted_fadvise_bytes"] + behind == counted["removed_bytes"]
        assert model["resident_bytes"] == 0 == cached(path)
        assert not any(counted.get(name) for name in shown["uncounted"])


def test_doctor_says_what_tells(tmp_path: Path, sections: dict[str, str]) -> None:
    doctor = run("doctor", "--json")
    (row,) = [row for row in doctor.data["features"] if row["name"] == "access events"]
    place = {"fexit": "function filemap_get_pages", "raw_tp": "mm_filemap_get_pages"}
    section = sections["mm_filemap_get_pages"]
    assert row["ok"] is True and row["found"].startswith(place[section.partition("/")[0]])
    assert doctor.data["engines"]["agent"] == []
    path = make_file(tmp_path / "model.safetensors", 97)
    with governed(path):
        shown = "fexit/filemap_get_pages" in run("status").out
        assert shown == (sections == FUNCTIONS)
