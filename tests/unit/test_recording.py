# SPDX-License-Identifier: Apache-2.0
"""Recordings: the file format, what is added up, and that nothing grows without a bound."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagecache_bpf
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.process_tree import descendants
from pagecache_bpf.recording import format
from pagecache_bpf.recording.expected_order import MAX_RANGES, bounded
from pagecache_bpf.recording.format import COUNTERS, EXPECTED, ExpectedOrder, Recording
from pagecache_bpf.recording.phases import VARIABLE, PhaseListener, taken_from
from pagecache_bpf.recording.recorder import CELLS, EventSums, cell_pages
from tests.unit.command import NOBODY, ROOT, environment, run
from tests.unit.recordings import MIB, load

PAGE = os.sysconf("SC_PAGE_SIZE")


def same(one: Recording, other: Recording) -> None:
    """Compare all that a recording has."""
    assert np.array_equal(one.events, other.events)
    assert one.expected.source == other.expected.source
    assert np.array_equal(one.expected.ranges, other.expected.ranges)
    arrays = {"events": None, "expected": None}
    assert {**vars(one), **arrays} == {**vars(other), **arrays}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    recording = load()
    recording.resident = {(0, 3): 17, (1, 0): MIB}
    recording.uncounted = ("read_stall_ns",)
    recording.device_limit = None
    format.write(recording, tmp_path / "load.pcrec")
    same(format.read(tmp_path / "load.pcrec"), recording)
    assert [path.name for path in tmp_path.iterdir()] == ["load.pcrec"]


def test_the_first_recordings_had_no_template(tmp_path: Path) -> None:
    path = tmp_path / "load.pcrec"
    format.write(load(), path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE template")
        database.execute("DELETE FROM meta WHERE key = 'template'")
        database.commit()
    found = format.read(path)
    assert found.expected.source == "" and not len(found.expected.ranges)
    assert found.total("miss_bytes") == 5 * MIB


@pytest.mark.parametrize(("consumers", "cell"), [(1, 1), (8, 1), (8, 1 << 20)])
def test_a_large_template_takes_little_room(consumers: int, cell: int) -> None:
    count = 300_007
    table = np.zeros(count, EXPECTED)
    table["consumer"] = np.sort(np.arange(count) % consumers)
    table["offset"], table["bytes"] = np.arange(count) * 4099, 4099
    order = bounded(ExpectedOrder("large", table), cell)
    assert order.source == "large" and 1 < len(order.ranges) <= MAX_RANGES + consumers
    for consumer in range(consumers):
        before = table[table["consumer"] == consumer]
        after = order.ranges[order.ranges["consumer"] == consumer]
        assert after["bytes"].sum() == before["bytes"].sum()
        assert after["offset"][0] == before["offset"][0]


def test_anybody_can_ask_it_in_sql(tmp_path: Path) -> None:
    format.write(load(), tmp_path / "load.pcrec")
    database = sqlite3.connect(tmp_path / "load.pcrec")
    assert database.execute("SELECT sum(useful_bytes), sum(miss_bytes) FROM events").fetchone() == (
        *(7 * MIB, 5 * MIB),
    )


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no recording"):
        format.read(tmp_path / "none")
    text = tmp_path / "text"
    text.write_text("no database at all, but long enough to be looked at" * 50)
    with pytest.raises(UsageError, match="is not a recording"):
        format.read(text)
    other = tmp_path / "other"
    database = sqlite3.connect(other)
    database.executescript("CREATE TABLE meta (key, value); INSERT INTO meta VALUES ('a', 1);")
    database.close()
    with pytest.raises(UsageError, match="another database"):
        format.read(other)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ("UPDATE meta SET value = 2 WHERE key = 'version'", PagecacheError, "version 2"),
        ("DELETE FROM meta WHERE key = 'seconds'", PagecacheError, "damaged"),
        ("UPDATE meta SET value = 'x' WHERE key = 'tick_ns'", PagecacheError, "damaged"),
        ("DROP TABLE events", UsageError, "not a recording"),
        ("UPDATE events SET file = 9", PagecacheError, "damaged"),
        ("UPDATE events SET hit_bytes = 'many'", PagecacheError, "damaged"),
        ("UPDATE template SET file = -1", PagecacheError, "damaged"),
        ("DROP TABLE template", UsageError, "not a recording"),
    ],
)
def test_a_damaged_recording_is_told(
    tmp_path: Path, change: str, error: type[PagecacheError], text: str
) -> None:
    path = tmp_path / "load.pcrec"
    format.write(load(), path)
    database = sqlite3.connect(path)
    database.execute(change)
    database.commit()
    database.close()
    with pytest.raises(error) as raised:
        format.read(path)
    assert text in str(raised.value)


def test_a_recording_that_was_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "load.pcrec"
    format.write(load(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PagecacheError):
        format.read(path)


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        format.write(load(), tmp_path / "no" / "load.pcrec")


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(0, 999), st.integers(0, 3)),
        max_size=200,
    ),
    st.integers(1, 50),
)
def test_sums_keep_every_byte_and_stay_bounded(
    places: list[tuple[int, int, int, int]], limit: int
) -> None:
    sums = EventSums(limit=limit)
    for number, place in enumerate(places):
        sums.add({place: [number + 1] * len(COUNTERS)})
    table = sums.table({1: 0, 2: 1, 3: 2})
    expected = len(places) * (len(places) + 1) // 2
    assert all(int(table[name].sum()) == expected for name in COUNTERS)
    cells = {(slot, cell, tgid) for slot, cell, _, tgid in places}
    assert len(table) <= max(limit, 2 * len(cells))
    assert list(table["tick"]) == sorted(table["tick"])


@given(st.integers(1, 1 << 44))
def test_cells_are_powers_of_two_and_few(size: int) -> None:
    pages = cell_pages(size)
    assert pages & (pages - 1) == 0
    assert -(-size // (pages * PAGE)) <= CELLS + 1
    assert pages * PAGE <= max(256 << 10, 2 * size // CELLS + 2 * PAGE)


def test_phases_come_with_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = PhaseListener(tmp_path)
    monkeypatch.setenv(VARIABLE, listener.environment[VARIABLE])
    before = time.monotonic_ns()
    pagecache_bpf.phase("weights")
    pagecache_bpf.phase("x" * 1000)
    (at, name, tgid), (_, long, _) = listener.take()
    assert before <= at <= time.monotonic_ns()
    assert (name, tgid, long) == ("weights", os.getpid(), "x" * 100)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"\xff\xfe nonsense", listener.path)
    assert listener.take() == []
    # a recording within a recording: both are told
    (tmp_path / "2").mkdir()
    inner = PhaseListener(tmp_path / "2")
    monkeypatch.setenv(VARIABLE, inner.environment[VARIABLE])
    pagecache_bpf.phase("both")
    assert [phase.name for phase in listener.take() + inner.take()] == ["both", "both"]
    assert taken_from(os.environ, inner.path) == listener.path
    inner.close()
    listener.close()
    pagecache_bpf.phase("nobody listens any more")
    monkeypatch.delenv(VARIABLE)
    pagecache_bpf.phase("nobody ever listened")


def test_children_are_found_with_theirs() -> None:
    import subprocess

    command = ["sh", "-c", "sleep 30 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        sleeper = int(shell.stdout.readline())
        assert {shell.pid, sleeper} <= set(descendants(os.getpid()))
        assert descendants(shell.pid) == [shell.pid, sleeper]
        os.kill(sleeper, 15)
        shell.terminate()


def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x02\0\0\0\0\0\0\0{}" + bytes(100))
    result = run("record", weights, "--seconds", "0")
    assert result.code in (2, 4) and not result.out
    result = run("report", tmp_path / "none.pcrec")
    assert result.code == 2 and "there is no recording" in result.err


def test_a_load_that_cannot_be_recorded_goes_on(tmp_path: Path) -> None:
    """Without root; where the file cannot be written it is the caller's mistake."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x02\0\0\0\0\0\0\0{}" + bytes(100))
    weights.chmod(0o644)
    code = (
        "import sys, pagecache_bpf as pc\n"
        "with pc.load(sys.argv[1], record=sys.argv[2]) as load: pass\n"
        "print(load.report().recording, load.report().notes[-1])\n"
    )
    done = subprocess.run(
        [
            *(NOBODY if os.geteuid() == 0 else ()),
            sys.executable,
            "-c",
            code,
            weights,
            tmp_path / "none.pcrec",
        ],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=120,
    )
    assert done.stdout == "None there is no recording: recording a load takes root\n", done.stderr
    with pytest.raises(UsageError, match="cannot be written"):
        pagecache_bpf.load(weights, record=tmp_path / "no" / "x.pcrec")
