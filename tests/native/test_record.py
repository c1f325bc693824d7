# SPDX-License-Identifier: Apache-2.0
"""Recordings of real loads on this machine's own kernel: every byte, by what it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.policy import agent_device
from pagecache_bpf.recording import format
from pagecache_bpf.recording.format import RecordedTensor, Recording
from pagecache_bpf.recording.recorder import Recorder, tensors_of
from pagecache_bpf.reporting import page
from pagecache_bpf.weights.models import Model, resolve
from tests.native.readahead import usual_readahead
from tests.observing import pread, reader, recorded_exactly, stream, touch
from tests.unit.command import COMMAND, ROOT, Result, environment, run
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native

PAGES = 8191
SIZE = PAGES * PAGE_SIZE


@pytest.fixture(autouse=True)
def _nothing_attached() -> Iterator[None]:
    """No policy is attached before or after a test."""
    if agent_device.is_running():
        run("detach", "--all")
    yield
    if agent_device.is_running():
        run("detach", "--all")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A cold file on a device with the usual readahead window."""
    path = make_file(tmp_path / "model.bin", PAGES)
    drop([path])
    assert resident_pages(path) == 0
    with usual_readahead(path):
        yield path


def record(file: Path, *command: str) -> tuple[Result, Recording]:
    """Record a command that has to be recorded."""
    output = file.with_name("load.pcrec")
    result = run("record", file, "-o", output, "--json", "--", *command)
    assert result.err == ""
    return result, format.read(output)


def reads(file: Path) -> tuple[str, ...]:
    """A command that reads a file from front to back."""
    return ("dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none")


def accessed(recording: Recording) -> int:
    """Bytes that readers wanted."""
    names = ("hit_bytes", "useful_bytes", "late_bytes", "ahead_bytes", "miss_bytes")
    return sum(recording.total(name) for name in names)


def test_a_cold_read_is_recorded_byte_by_byte(file: Path) -> None:
    result, recording = record(file, *reads(file))
    assert result.code == 0 and recording.exit_code == 0
    assert accessed(recording) == SIZE == result.data["accessed_bytes"]
    assert recording.total("read_bytes") == resident_pages(file) * PAGE_SIZE == SIZE
    assert recording.total("hit_bytes") == recording.total("prefetched_bytes") == 0
    assert recording.lost == 0 and recording.resident == {}
    assert list(recording.readers.values()) == ["dd"]
    # each cell was read in once, and wanted once, however large the folios and calls were
    sizes: dict[int, int] = {}
    for row in recording.events:
        sizes[int(row["cell"])] = sizes.get(int(row["cell"]), 0) + int(row["read_bytes"])
    cells = -(-SIZE // recording.cell_bytes)
    last = SIZE - (cells - 1) * recording.cell_bytes
    assert sizes == {cell: recording.cell_bytes for cell in range(cells - 1)} | {cells - 1: last}
    assert recording.samples[-1].device_bytes >= SIZE


def test_a_warm_read_is_all_hit(file: Path) -> None:
    file.read_bytes()
    _, recording = record(file, *reads(file))
    assert recording.total("hit_bytes") == accessed(recording) == SIZE
    assert recording.total("read_bytes") == 0
    assert sum(recording.resident.values()) == SIZE


def test_prefetch_is_told_from_readahead(file: Path) -> None:
    """The agent's own observer, which is another one, has counted the same."""
    assert run("attach", "sequential", "--engine", "agent", file).code == 0
    _, recording = record(file, *reads(file))
    (model,) = run("stats", "--json").data["models"]
    counters = model["counters"]
    assert (recording.policy, recording.engine) == ("sequential", "agent")
    assert recording.total("prefetched_bytes") == counters["prefetched_bytes"] > 0
    used = recording.total("useful_bytes") + recording.total("late_bytes")
    assert 0 < used <= recording.total("prefetched_bytes")
    # the recorder itself has looked at the header
    assert SIZE == accessed(recording) <= counters["read_bytes"] <= SIZE + (1 << 20)


def test_what_is_dropped_is_recorded(file: Path) -> None:
    file.read_bytes()
    code = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n"
    )
    _, recording = record(file, sys.executable, "-c", code, str(file))
    assert recording.total("discarded_bytes") == SIZE
    assert recording.total("dropped_bytes") == recording.total("reclaimed_bytes") == 0


def test_phases_of_the_command_are_recorded(file: Path) -> None:
    code = (
        "import sys, pagecache_bpf as pc\n"
        "pc.phase('start'); data = open(sys.argv[1], 'rb').read(); pc.phase('done')\n"
    )
    _, recording = record(file, sys.executable, "-c", code, str(file))
    assert [phase.name for phase in recording.phases] == ["start", "done"]
    begin, end = (phase.time_ns for phase in recording.phases)
    assert {phase.tgid for phase in recording.phases} == set(recording.readers)
    ticks = recording.events["tick"][recording.events["tgid"] != 0]
    assert begin // recording.tick_ns <= ticks.min() <= ticks.max() <= end // recording.tick_ns


def test_the_command_keeps_its_exit_code(file: Path) -> None:
    result, recording = record(file, "sh", "-c", f"cat {file} >/dev/null; exit 17")
    assert result.code == recording.exit_code == 17
    output = file.with_name("none.pcrec")
    result = run("record", file, "-o", output, "--", "no-such-command")
    assert result.code == 127 and "cannot be run" in result.err and not output.exists()
    result = run("record", file, "-o", output, "--", "true")
    assert result.code == 1 and "nothing was recorded" in result.err and not output.exists()


def test_without_a_command_it_records_until_it_is_interrupted(file: Path) -> None:
    output = file.with_name("load.pcrec")
    with subprocess.Popen(
        [*COMMAND, "record", str(file), "-o", str(output)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as recorder:
        assert recorder.stderr is not None
        # Once it says so the programs are attached, and nothing that is read is missed.
        assert "recording" in recorder.stderr.readline()
        for _ in range(3):
            drop([file])
            file.read_bytes()
        recorder.send_signal(signal.SIGINT)
        out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    assert "recorded" in out
    recording = format.read(output)
    assert accessed(recording) == 3 * SIZE
    assert recording.exit_code is None


LOAD = """
import sys, pagecache_bpf as pc
with pc.load(sys.argv[1], record=sys.argv[2]) as load:
    load.ready()
    pc.phase("weights")
    data = open(sys.argv[1], "rb").read()
print(load.report().recording)
print(load.report().policy, load.report().engine)
sys.stdout.flush()
with pc.load(sys.argv[1], record=sys.argv[3]) as load:
    open(sys.argv[1], "rb").read()
    os = __import__("os")
    os.kill(os.getpid(), 9)
"""


def test_a_load_of_the_api_records_itself(file: Path) -> None:
    """Also one whose process is killed in the middle."""
    output, killed = file.with_name("api.pcrec"), file.with_name("killed.pcrec")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, file, output, killed],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.splitlines() == [str(output), "sequential agent"]
    recording = format.read(output)
    assert accessed(recording) == SIZE
    assert (recording.policy, recording.engine) == ("sequential", "agent")
    assert [phase.name for phase in recording.phases] == ["weights"]
    # done() has dropped what the load has brought, and the recorder has left nothing behind
    assert recording.total("discarded_bytes") + recording.total("dropped_bytes") == SIZE
    wait_for(killed.exists, "the recording of the killed load", 60)
    assert accessed(format.read(killed)) == SIZE


def test_the_same_model_is_recorded_twice_at_once(file: Path) -> None:
    """Two recorders beside each other see the same load."""
    other = file.with_name("other.pcrec")
    result, recording = record(
        file, *COMMAND, "record", str(file), "-o", str(other), "--", *reads(file)
    )
    assert result.code == 0
    assert accessed(format.read(other)) == SIZE
    assert accessed(recording) >= SIZE


def test_every_class_is_what_the_observer_counted(file: Path) -> None:
    """Reads, mappings, readers that jump, prefetch, drops: to the byte and the nanosecond."""
    assert run("attach", "sequential", "--engine", "agent", file).code == 0
    some = random.Random(4711)
    spans = [(some.randrange(SIZE - 9_000), some.randrange(1, 9_000)) for _ in range(307)]
    with Recorder(Model("exact", file, (file,))) as recorder:
        readers = [
            reader(file, stream(3 * PAGE_SIZE)),
            reader(file, ["advise", 0, 0, os.POSIX_FADV_DONTNEED]),
            reader(file, ["advise", 0, 0, os.POSIX_FADV_RANDOM], pread(*spans)),
            reader(file, touch()),
        ]
        recorder.poll()
        # what was prefetched behind the readers has to be there, or gone, before it is counted
        wait_for(lambda: resident_pages(file) == PAGES, "the rest of the file", 60)
        drop([file])
        counters = recorder.counters()
        recording = recorder.finish()
    recorded_exactly(recording, counters)
    assert set(recording.readers) == {tgid for tgid in readers if counters.get(tgid)}
    assert recording.total("discarded_bytes") + recording.total("dropped_bytes") >= SIZE
    assert all(recording.total(name) > 0 for name in ("prefetched_bytes", "hit_bytes", "stall_ns"))


def test_stalls_and_evictions_say_who_and_where(tmp_path: Path) -> None:
    """Of three tensors one process reads the second from the disk, another drops the third."""
    rows = (1021, 2039, 4093)
    path = tmp_path / "model.safetensors"
    save_file({f"t{at}": np.ones((count, 1024), np.float32) for at, count in enumerate(rows)}, path)
    os.sync()
    drop([path])
    model = resolve(path)
    _, second, third = tensors_of(model)
    path.read_bytes()
    with path.open("rb") as opened:  # only the second is not in the cache
        os.posix_fadvise(opened.fileno(), second.offset, second.bytes, os.POSIX_FADV_DONTNEED)
    with Recorder(model) as recorder:
        waits = reader(path, pread((second.offset, second.bytes)))
        reader(path, ["advise", third.offset, third.bytes, os.POSIX_FADV_DONTNEED])
        recorder.poll()
        recording = recorder.finish()
    events, cell = recording.events, recording.cell_bytes

    def cells(tensor: RecordedTensor) -> set[int]:
        return set(range(tensor.offset // cell, (tensor.offset + tensor.bytes - 1) // cell + 1))

    stalled = events[events["stall_ns"] > 0]
    assert set(stalled["tgid"]) == {waits} and set(stalled["cell"]) <= cells(second)
    dropped = events[events["discarded_bytes"] > 0]
    assert set(dropped["cell"]) <= cells(third)
    # whole folios only: those that the tensor shares with its neighbor stay
    gone = recording.total("discarded_bytes")
    pages = -(-path.stat().st_size // PAGE_SIZE)
    assert gone == (pages - resident_pages(path)) * PAGE_SIZE
    assert 0.9 * third.bytes < gone <= third.bytes
    assert recording.total("reclaimed_bytes") == recording.total("dropped_bytes") == 0


def test_what_finds_no_room_is_counted_and_told(file: Path) -> None:
    """With intervals so short that the kernel's map is full before it is read out."""
    file.read_bytes()
    with Recorder(Model("full", file, (file,)), tick_ns=100) as recorder:
        reader(file, *[stream(PAGE_SIZE)] * 20)  # 163,820 events; the map has room for 65,536
        counters = recorder.counters()
        recording = recorder.finish()
    assert counters[0]["read_bytes"] == 20 * SIZE
    assert recording.lost > 0 and 0 < accessed(recording) < 20 * SIZE
    text = page.page([recording], ["full"])
    assert f'"lost":{recording.lost},' in text


def order_of(recording: Recording) -> list[str]:
    """The tensors in the order of a recording's template, behind the header."""
    found: list[str] = []
    for row in recording.expected.ranges[1:]:
        middle = int(row["offset"] + row["bytes"] // 2)
        (name,) = (
            tensor.name
            for tensor in recording.tensors
            if tensor.offset <= middle < tensor.offset + tensor.bytes
        )
        if found[-1:] != [name]:
            found.append(name)
    return found


def test_the_template_that_is_followed_is_recorded(tmp_path: Path) -> None:
    """Not one that would be derived: the page compares with what the policy goes by."""
    path = tmp_path / "model.safetensors"
    names = [f"t{number}" for number in range(5)]
    save_file({name: np.ones((1021, 512), np.float32) for name in names}, path)
    mine = tmp_path / "mine.template"
    order = tmp_path / "names"
    order.write_text("\n".join(reversed(names)))
    assert run("template", "derive", path, "--list", order, "-o", mine).code == 0
    assert run("attach", "maio", "--engine", "agent", "--template", mine, path).code == 0
    _, recording = record(path, *reads(path))
    assert recording.expected.source == "derived"
    assert order_of(recording) == names[::-1]
    assert run("detach", "--all").code == 0
    # without a policy, the one that a policy would derive, unless another one is named
    drop([path])
    _, recording = record(path, *reads(path))
    assert recording.expected.source == "derived: safetensors keys"
    assert recording.expected.ranges.tolist() == [(0, 0, 0, path.stat().st_size)]
    output = path.with_name("load.pcrec")
    result = run("record", path, "-o", output, "--template", mine, "--", *reads(path))
    assert result.code == 0 and format.read(output).expected.source == "derived: safetensors list"
    result = run("record", path, "-o", output, "--template", path, "--", *reads(path))
    assert result.code == 2 and "is not a template" in result.err
