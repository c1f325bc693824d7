# SPDX-License-Identifier: Apache-2.0
"""Reports: every byte is in the grid, the page is whole and bounded, and names are text."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import report_page
from pagecache_bpf.recording import format
from pagecache_bpf.recording.format import (
    COUNTERS,
    EVENT,
    EXPECTED,
    ExpectedOrder,
    RecordedFile,
)
from pagecache_bpf.reporting import page, perfetto, template_line
from pagecache_bpf.reporting.grid import (
    AHEAD,
    EVICTED,
    HIT,
    LATE,
    MAX_COLUMNS,
    MAX_DETAILS,
    MAX_ROWS,
    MISS,
    PREFETCHED,
    RESIDENT,
    Grid,
)
from tests.unit.command import run
from tests.unit.recordings import MIB, TICK, event, load


def test_the_grid_has_every_cell_of_a_small_load() -> None:
    grid = Grid(load())
    assert (grid.rows, grid.columns, grid.readers) == (12, 15, [101, 103])
    assert grid.begin_ns == 2 * TICK  # nothing happens before
    picture = grid.picture()
    state, found = picture & 3, picture >> 4
    assert [int(row) for row in state[3, :]] == [*[PREFETCHED] * 4, *[RESIDENT] * 11]
    assert [int(row) for row in found[3, :]] == [0] * 4 + [HIT] + [0] * 10
    assert int(state[0, 14]) == EVICTED and int(state[0, 13]) == RESIDENT
    assert [int(found[7 + cell, 9 + cell]) for cell in range(5)] == [MISS] * 5
    series = grid.series()
    assert sum(series["hit"]) == 7 * MIB and sum(series["miss"]) == 5 * MIB
    assert series["unused"][0] == 7 * MIB and series["unused"][7] == 0
    assert series["resident"][14] == 11 * MIB
    assert sum(series["device"]) == pytest.approx(12 * MIB * 15 / 17)
    # all of the first file in the beginning, and what is not used yet after that
    window = grid.window().tolist()
    assert window == [[0, 0, 7], *([1 + cell, cell + 1, 7] for cell in range(6))]
    assert grid.stalls().sum(axis=1).tolist() == [0, 5 * 1_000_003]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3 << 20), min_size=1, max_size=40),
    seed=st.integers(0, 1 << 30),
    count=st.integers(1, 300),
    ticks=st.integers(1, 5000),
)
def test_no_byte_is_lost_or_doubled(sizes: list[int], seed: int, count: int, ticks: int) -> None:
    rng = np.random.default_rng(seed)
    cell = 64 << 10
    rows = []
    for _ in range(count):
        file = int(rng.integers(len(sizes)))
        place = int(rng.integers(-(-sizes[file] // cell)))
        values = {name: int(rng.integers(1 << 20)) for name in COUNTERS}
        rows.append(event(file, place, int(rng.integers(ticks)), int(rng.integers(4)), **values))
    recording = replace(
        load(),
        files=[RecordedFile(f"{number}", size) for number, size in enumerate(sizes)],
        cell_bytes=cell,
        events=np.array(sorted(rows, key=lambda row: row[2]), EVENT),
    )
    grid = Grid(recording)
    assert grid.rows <= MAX_ROWS and grid.columns <= MAX_COLUMNS
    for at, name in enumerate(COUNTERS):
        assert int(grid.details.counters[:, at].sum()) == recording.total(name)
        assert int(grid.matrix(name).sum()) == recording.total(name)
    assert int(grid.stalls().sum()) == int(
        recording.events["stall_ns"][recording.events["tgid"] != 0].sum()
    )
    assert set(np.unique(grid.picture() >> 4)) <= {0, HIT, AHEAD, LATE, MISS}


def test_a_large_load_makes_a_small_page() -> None:
    """700 GB in 1,000 shards with 100,000 tensors, eight readers."""
    recording = report_page.large_recording()
    grid = Grid(recording)
    assert len(grid.details.row) <= 2 * MAX_DETAILS < len(recording.events)
    text = page.page([recording, recording], ["large", "as large"])
    assert len(text.encode()) < 2 << 20


def test_the_template_is_laid_over_what_was_read() -> None:
    recording = load()
    found = template_line.line(Grid(recording))
    assert found is not None and found.distance == 0
    assert found.place.tolist() == [at * MIB for at in range(12)]
    recording.expected = ExpectedOrder()
    assert template_line.line(Grid(recording)) is None
    # a template of something else: nothing that was read is listed
    recording.expected = ExpectedOrder("other", np.array([(0, 0, 0, 0)], EXPECTED))
    recording.events = recording.events[recording.events["file"] == 1]
    found = template_line.line(Grid(recording))
    assert found is not None and found.distance is None


def test_each_rank_is_compared_with_its_own_consumer() -> None:
    """Rank 1 reads its file first to last, rank 0 its own; the template has one consumer each."""
    recording = load()
    both = np.array([(0, 0, 0, 7 * MIB), (1, 1, 0, 5 * MIB)], EXPECTED)
    recording.expected = ExpectedOrder("two ranks", both)
    found = template_line.line(Grid(recording))
    assert found is not None and found.distance == 0
    other = both.copy()
    other["file"] = [1, 0]
    recording.expected = ExpectedOrder("the other way round", other)
    found = template_line.line(Grid(recording))
    assert found is not None and found.distance is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(1, MIB)),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 3),
)
def test_any_template_can_be_laid_over_a_load(
    ranges: list[tuple[int, int, int]], consumers: int
) -> None:
    recording = load()
    rows = [
        (number, file, min(at, 4 if file else 6) * MIB, size)
        for number in range(consumers)
        for file, at, size in ranges
    ]
    recording.expected = ExpectedOrder("any", np.array(rows, EXPECTED))
    grid = Grid(recording)
    found = template_line.line(grid)
    assert found is not None and (found.distance is None or 0 <= found.distance <= 12 * MIB)
    columns, places = found.cells.T
    assert ((columns >= 0) & (columns < grid.columns)).all()
    assert ((places >= 0) & (places < grid.rows)).all()


def _data(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    data: dict[str, object] = json.loads(found[1])
    return data


def test_the_page_needs_nothing_else() -> None:
    text = page.page([load()], ["one"])
    assert "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    outside = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.S)
    assert not re.search(r"(?:src|href)=", outside)
    assert not re.search(r"@import|url\(", text)


def test_names_are_never_markup() -> None:
    hostile = "</script><script>alert(1)</script><!-- {{script}} \x1b[31m\n"
    recording = load((hostile, "b"))
    recording.model = recording.command = hostile
    recording.files[0] = RecordedFile("/m/" + hostile, 7 * MIB)
    recording.readers[101] = hostile
    text = page.page([recording], [hostile])
    assert "alert(1)</script>" not in text and text.count("<script") == 3
    shown = _data(text)["loads"][0]  # type: ignore[index]
    names = zlib.decompress(base64.b64decode(shown["tensors"]["names"])).decode()
    assert names == hostile + "\0b"
    assert shown["files"][0]["path"] == "/m/" + hostile


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device_limit": 12.0 * MIB / 0.15}, "The device limited the load"),
        ({}, "The reader limited the load"),
        ({"events": np.zeros(0, EVENT)}, "No process read"),
    ],
)
def test_what_limited_the_load(change: dict[str, object], text: str) -> None:
    assert page.verdict(replace(load(), **change)).startswith(text)  # type: ignore[arg-type]


def test_stalls_and_reclaim_are_told() -> None:
    recording = load()
    recording.events["stall_ns"] *= 20
    assert page.verdict(recording).startswith("Readers waited for I/O 67% of the time")
    recording.events["reclaimed_bytes"][0] = 3 * MIB
    assert page.verdict(recording).startswith("Memory was short: 3.0 MiB were reclaimed")


def test_a_trace_for_perfetto_has_every_byte(tmp_path: Path) -> None:
    pb2 = pytest.importorskip(
        "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="needs the extra perfetto"
    )
    perfetto.write(load(), tmp_path / "load.pftrace")
    trace = pb2.Trace()
    trace.ParseFromString((tmp_path / "load.pftrace").read_bytes())
    names = {
        packet.track_descriptor.uuid: packet.track_descriptor.name
        for packet in trace.packet
        if packet.HasField("track_descriptor")
    }
    assert {"rank0", "rank1", "phases", "/m/one.safetensors", "resident bytes"} <= set(
        names.values()
    )
    slices = [
        (names[packet.track_event.track_uuid], packet.timestamp, packet.track_event)
        for packet in trace.packet
        if packet.track_event.type == pb2.TrackEvent.TYPE_SLICE_BEGIN
    ]
    notes = [
        (track, at, {note.name: note.int_value for note in part.debug_annotations})
        for track, at, part in slices
    ]
    assert sum(note.get("miss_bytes", 0) for track, _, note in notes) == 5 * MIB
    assert sum(note["bytes"] for _, _, note in notes if "bytes" in note) == 13 * MIB
    assert [at for track, at, _ in notes if track == "rank0"] == [
        (3 + cell) * TICK for cell in range(7)
    ]
    assert ("phases", 3 * TICK, {}) in notes


def test_the_command_makes_a_page(tmp_path: Path) -> None:
    for name in ("one", "two"):
        format.write(load(), tmp_path / f"{name}.pcrec")
    result = run("report", tmp_path / "one.pcrec", "--compare", tmp_path / "two.pcrec", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    text = (tmp_path / "one.html").read_text()
    assert told["bytes"] == len(text.encode()) and len(told["loads"]) == 2
    assert len(_data(text)["loads"]) == 2  # type: ignore[arg-type]
    result = run("report", tmp_path / "one.pcrec", "-o", tmp_path / "one.pcrec")
    assert result.code == 2 and "is the recording itself" in result.err
    format.read(tmp_path / "one.pcrec")
