# SPDX-License-Identifier: Apache-2.0
"""simulate: the optimum against brute force, LRU against a dictionary, traces, the command."""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagecache_bpf import templates
from pagecache_bpf.errors import UsageError
from pagecache_bpf.policy.catalog import discover, find
from pagecache_bpf.reporting.grid import Grid
from pagecache_bpf.simulate import recorded, replay_recording, simulator, trace
from pagecache_bpf.simulate.optimum import optimum
from pagecache_bpf.simulate.trace import Trace, parse
from pagecache_bpf.templates import EXTENT, Template, TemplateFile
from tests.unit.command import run

PAGE = 4096
MIB = 1 << 20


def brute_force(pages: tuple[int, ...], capacity: int) -> int:
    """Most hits that any choice of victims gets."""

    @cache
    def most(at: int, resident: frozenset[int]) -> int:
        if at == len(pages):
            return 0
        page = pages[at]
        if page in resident:
            return 1 + most(at + 1, resident)
        if len(resident) < capacity:
            return most(at + 1, resident | {page})
        return max(most(at + 1, resident - {victim} | {page}) for victim in resident)

    return most(0, frozenset())


@given(
    pages=st.lists(st.integers(0, 6), max_size=14).map(tuple),
    capacity=st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_the_optimum_is_what_brute_force_finds(pages: tuple[int, ...], capacity: int) -> None:
    assert optimum(pages, capacity).hits == brute_force(pages, capacity)


def test_the_optimum_of_a_cyclic_scan() -> None:
    # 3 of 4 pages fit: each round after the first hits three.
    assert optimum([0, 1, 2, 3] * 3, 3).hits == brute_force((0, 1, 2, 3) * 3, 3) == 6
    assert optimum([1, 1], 0).hits == 0
    assert optimum([1, 2, 1], 2, weights=[10, 20, 30]).hit_weight == 30


def lru_hits(pages: list[int], capacity: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for page in pages:
        hits += page in cache
        cache[page] = None
        cache.move_to_end(page)
        if len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@pytest.fixture(scope="module")
def noop() -> simulator.Simulator:
    return simulator.Simulator(find("noop"))


def page_trace(pages: list[int], file_pages: int = 16) -> Trace:
    trace = Trace()
    trace.file("m/f")
    trace.files[0].size = file_pages * PAGE
    for at, page in enumerate(pages):
        trace.add(at, "c", "m/f", page * PAGE, PAGE)
    return trace.settle()


@given(pages=st.lists(st.integers(0, 11), max_size=60), capacity=st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_lru_is_a_dictionary_in_the_order_of_use(
    noop: simulator.Simulator, pages: list[int], capacity: int
) -> None:
    result = noop.replay(page_trace(pages), capacity * PAGE, policy=False, order=simulator.LRU)
    assert result.hit_bytes == lru_hits(pages, capacity) * PAGE
    assert result.totals["peak_bytes"] <= capacity * PAGE
    assert result.totals["read_bytes"] - result.reread_bytes == len(set(pages)) * PAGE


@given(pages=st.lists(st.integers(0, 11), max_size=60), capacity=st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_nothing_beats_the_optimum_and_bytes_add_up(
    noop: simulator.Simulator, pages: list[int], capacity: int
) -> None:
    trace = page_trace(pages)
    best = simulator.best(trace, capacity * PAGE)
    for policy in (False, True):
        result = noop.replay(trace, capacity * PAGE, policy=policy)
        totals = result.totals
        assert result.hit_bytes <= best.hit_bytes
        assert (
            totals["hit_bytes"] + totals["ahead_bytes"] + totals["missed_bytes"]
            == (totals["wanted_bytes"])
        )
        assert totals["peak_bytes"] <= capacity * PAGE


def test_parts_of_pages_count_as_what_they_are(noop: simulator.Simulator) -> None:
    trace = Trace()
    trace.add(0, "c", "f", 100, 50)
    trace.add(1, "c", "f", 120, 5000)
    result = noop.replay(trace.settle(), 8 * PAGE)
    assert result.totals["wanted_bytes"] == 5050
    assert result.hit_bytes == PAGE - 120  # what the first read has left of its page
    assert simulator.best(trace, 8 * PAGE).hit_bytes == result.hit_bytes


def test_what_is_kept_beyond_the_memory_is_evicted(tmp_path: Path) -> None:
    """A policy that keeps everything loses, and the replay ends."""
    source = tmp_path / "hoard.bpf.c"
    source.write_text(
        "/*\n * hoard - keeps all\n */\n"
        '#include "policy.bpf.h"\n'
        "PAGECACHE_EVICT(hoard_evict)\n(struct pagecache_ctx *ctx)\n"
        "{\n\treturn PAGECACHE_EVICT_KEEP;\n}\n"
        "PAGECACHE_POLICY(hoard, .evict = (void *)hoard_evict);\n"
    )
    result = simulator.Simulator(find(str(source))).replay(page_trace([*range(12)] * 2), 4 * PAGE)
    assert result.totals["peak_bytes"] == 4 * PAGE
    assert result.totals["keep_ignored"] > 0


def test_the_forms_of_a_trace() -> None:
    trace = parse(
        [
            "# a comment",
            "",
            '{"file": "/m/b.bin", "size": 16384, "model": "two", "governed": false}',
            "0.5 rank0 /m/a.bin 4KiB 4096",
            '{"t": 1, "consumer": "rank1", "file": "/m/b.bin", "offset": 0, "length": 10,'
            ' "cgroup": "x"}',
            '{"t": 1.5, "hint": "plans", "key": {"model": "two"}, "value": {"due_ns": "+5s"}}',
        ]
    )
    assert [(file.name, file.size, file.model, file.governed) for file in trace.files] == [
        ("/m/b.bin", 16384, "two", False),
        ("/m/a.bin", 8192, "m", True),
    ]
    first, second = trace.accesses
    assert (first.time_ns, first.offset, first.length) == (500_000_000, 4096, 4096)
    assert (second.consumer, second.cgroup) == (1, 1)
    assert trace.models == ["two", "m"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("1 c f 0", "not enough values"),
        ("x c f 0 1", "could not convert"),
        ("1 c f 0 1parsec", "not a size"),
        ('{"t": 1, "file": "f", "length": 3}', "it lacks 'offset'"),
        ('{"t": 1', "Expecting"),
        ('{"t": 1, "file": "f", "offset": -1, "length": 1}', "below 0"),
        ("-1 c f 0 1", "not a time"),
        ("nan c f 0 1", "not a time"),
    ],
)
def test_bad_lines_are_named(line: str, why: str) -> None:
    with pytest.raises(UsageError, match=rf"line 2 of trace.*{why}"):
        parse(["0 c f 0 1", line])


def test_time_does_not_go_back() -> None:
    with pytest.raises(UsageError, match="before that of the line above"):
        parse(["5 c f 0 1", "4 c f 0 1"])
    with pytest.raises(UsageError, match="nothing is read"):
        parse(["# empty"])


def cyclic_trace(tmp_path: Path, rounds: int = 3) -> Path:
    path = tmp_path / "scan.trace"
    steps = [f"{r}.{i:02} c0 /m/w.bin {i}MiB 1MiB" for r in range(rounds) for i in range(12)]
    path.write_text("\n".join(steps))
    return path


def test_the_command(tmp_path: Path) -> None:
    trace = cyclic_trace(tmp_path)
    words = ["simulate", "--policy", "pin", "--trace", str(trace), "--memory", "8MiB"]
    done = run(*words, "--knob", "budget_mib=6", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    by_name = {result["name"]: result for result in data["results"]}
    assert list(by_name) == ["pin", "default", "lru", "optimum"]
    assert data["distinct_bytes"] == 12 << 20 and data["knobs"]["budget_mib"] == 6
    assert by_name["lru"]["hit_bytes"] == 0
    assert by_name["pin"]["hit_bytes"] >= 2 * (6 << 20)
    assert by_name["pin"]["gauges"] == {"promised_pages": 1536, "pinned_pages": 1536}
    page = tmp_path / "scan.html"
    done = run(*words, "--report", page)
    assert done.code == 0 and "optimum" in done.out
    assert f"page: {page}" in done.out.replace("\n", "") and "<title>scan" in page.read_text()
    done = run(*words, "--report", tmp_path / "none" / "scan.html")
    assert done.code == 2 and "cannot be written" in done.err


def test_a_policy_that_harms_says_so(tmp_path: Path) -> None:
    """A window that is larger than the memory is evicted before it is used."""
    trace = cyclic_trace(tmp_path)
    words = ["simulate", "--policy", "cyclic", "--trace", str(trace), "--json"]
    done = run(*words, "--memory", "12MiB")
    assert done.code == 0 and "than LRU" not in done.err
    small = ["--memory", "1MiB", "--knob", "window_kib=2048"]
    done = run(*words, *small)
    policy, _, lru, _ = json.loads(done.out)["results"]
    assert policy["read_bytes"] > lru["read_bytes"] + (2 << 20)
    assert "more from the device than LRU" in done.err


def test_who_keeps_all_is_not_asked_about_all_for_each_page(tmp_path: Path) -> None:
    """A model of 50,000 pages in a memory of 16,384 took hours so."""
    words = ["simulate", "--policy", "cyclic", "--trace", str(cyclic_trace(tmp_path)), "--json"]
    done = run(*words, "--memory", "8MiB")
    policy, *_ = json.loads(done.out)["results"]
    assert policy["keep_ignored"] > 0
    assert policy["asked"] < 512 * policy["evicted_bytes"] // 4096


@pytest.mark.parametrize("policy", ["noop", "pin", "sequential"])
def test_a_replay_as_a_recording_has_the_bytes_of_its_totals(tmp_path: Path, policy: str) -> None:
    found = trace.read(cyclic_trace(tmp_path))
    replayed = simulator.Simulator(find(policy))
    memory = 8 << 20
    for result, seen in (
        (replayed.replay(found, memory), replay_recording.record(replayed, found, memory)),
        (simulator.best(found, memory), replay_recording.record_best(found, memory)),
    ):
        totals = result.totals
        assert totals["hit_bytes"] == seen.total("hit_bytes")
        assert totals["ahead_bytes"] == seen.total("useful_bytes")
        assert totals["missed_bytes"] == seen.total("miss_bytes")
        entered = seen.total("read_bytes") + seen.total("prefetched_bytes")
        assert totals["read_bytes"] == entered == seen.samples[-1].device_bytes
        if result.name != "optimum":
            assert totals["evicted_bytes"] == seen.total("reclaimed_bytes")
            assert totals["dropped_bytes"] == seen.total("dropped_bytes")
            assert totals["unused_bytes"] == seen.total("wasted_bytes")
        resident = Grid(seen).resident.sum(axis=0)
        assert int(resident.max()) <= memory
        assert list(seen.readers.values()) == ["c0"]


@pytest.mark.parametrize("policy", [info.name for info in discover()])
def test_every_shipped_policy_can_be_replayed(tmp_path: Path, policy: str) -> None:
    words = ["--trace", str(cyclic_trace(tmp_path)), "--memory", "8MiB", "--json"]
    done = run("simulate", "--policy", policy, *words)
    assert done.code == 0, done.err
    by_name = {result["name"]: result for result in json.loads(done.out)["results"]}
    assert by_name[policy]["read_bytes"] >= by_name["optimum"]["read_bytes"] > 0


def test_a_consumer_with_a_node_is_read_ahead_of_at_once(tmp_path: Path) -> None:
    trace = tmp_path / "hinted.trace"
    lines = ["0 rank0 /m/w.bin 0 64KiB", "1 rank0 /m/w.bin 12MiB 4KiB"]
    read = []
    for hints in (
        [],
        ['{"t": 0, "hint": "consumers", "key": {"tgid": 1000}, "value": {"node": 1}}'],
    ):
        trace.write_text("\n".join([*hints, *lines]))
        words = ["--policy", "sequential", "--trace", str(trace), "--memory", "64MiB"]
        done = run("simulate", *words, "--json")
        assert done.code == 0, done.err
        read.append(json.loads(done.out)["results"][0]["read_bytes"])
    assert read == [(64 << 10) + 4096, (4 << 20) + 4096]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--memory", "1KiB"], "are no memory"),
        (["--memory", "8MiB", "--unit", "5000"], "not a page size"),
        (["--memory", "much"], "not a size"),
        (["--memory", "8MiB", "--knob", "nothing=1"], "has no knob"),
    ],
)
def test_wrong_use(tmp_path: Path, words: list[str], says: str) -> None:
    trace = cyclic_trace(tmp_path)
    done = run("simulate", "--policy", "pin", "--trace", str(trace), *words)
    assert done.code == 2 and says in done.err, done.err
    assert "Traceback" not in done.err


def test_a_missing_trace(tmp_path: Path) -> None:
    words = ["--trace", str(tmp_path / "none"), "--memory", "8MiB"]
    done = run("simulate", "--policy", "pin", *words)
    assert done.code == 2 and "cannot be read" in done.err


def test_a_template_is_a_trace(tmp_path: Path) -> None:
    """Two ranks that share a file: the second reads what the first has brought in."""
    path = tmp_path / "llama.template"
    rows = [(0, 0, 0, 3 * MIB, 3 * MIB), (0, 1, 4096, 8192, 8192), (1, 0, 0, MIB, MIB)]
    files = tuple(TemplateFile(f"{n}.safetensors", 4 * MIB, 0, 0, "0" * 64) for n in "ab")
    template = Template(files, ("one", "two"), np.array(rows, EXTENT), "recorded", "test")
    templates.write(template, path)
    found = recorded.read(path)
    assert [(file.name, file.model) for file in found.files] == [
        ("a.safetensors", "llama"),
        ("b.safetensors", "llama"),
    ]
    reads = [
        (access.consumer, access.file, access.offset, access.length) for access in found.accesses
    ]
    assert reads == [
        *((0, 0, 0, MIB), (1, 0, 0, MIB), (0, 0, MIB, MIB), (0, 0, 2 * MIB, MIB)),
        (0, 1, 4096, 8192),
    ]
    words = ["simulate", "--policy", "noop", "--trace", str(path), "--memory", "8MiB"]
    result = run(*words, "--json")
    assert result.data["distinct_bytes"] == 3 * MIB + 8192
    path.write_text("pagecache-bpf template 1\nsource: guessed\n")
    result = run(*words)
    assert result.code == 2 and "is not a template" in result.err


def test_a_recording_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "load.pcrec").write_bytes(b"\x00\xf8\xff")
    with pytest.raises(UsageError, match="is not a trace: it is not text"):
        trace.read(tmp_path / "load.pcrec")
