# SPDX-License-Identifier: Apache-2.0
"""The queue depth of engine `agent`: measured, kept, adapted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pagecache_bpf.agent import queue_depth
from pagecache_bpf.agent.queue_depth import DEFAULT_DEPTH, Depths, Tuner, probe
from pagecache_bpf.agent.readers import HOST_FLOOR_BYTES, host_window
from pagecache_bpf.agent.worker import CHUNK_BYTES, MAX_DEPTH

MIB = 1 << 20


class Device:
    """A device that reads so fast at each depth, and a queue that never runs empty."""

    def __init__(self, tuner: Tuner, speed: dict[int, float]) -> None:
        self.tuner, self.speed, self.now = tuner, speed, 0.0

    def read(self, nbytes: int, queued: int = 1 << 30) -> None:
        while nbytes > 0:
            self.now += CHUNK_BYTES / self.speed[self.tuner.depth]
            self.tuner.observe(CHUNK_BYTES, queued, self.now)
            nbytes -= CHUNK_BYTES


def at(**speeds: float) -> dict[int, float]:
    return {int(name.lstrip("d")): value * MIB for name, value in speeds.items()}


def test_a_deeper_queue_is_taken_where_it_pays() -> None:
    tuner = Tuner(4)
    Device(tuner, at(d2=300, d4=600, d8=1000, d16=1200, d32=1200)).read(64 << 30)
    assert tuner.depth in (16, 8, 32) and tuner._best == 16 and tuner.learned


def test_a_shallower_one_where_it_is_as_good() -> None:
    tuner = Tuner(16)
    Device(tuner, at(d1=200, d2=500, d4=500, d8=500, d16=500, d32=500)).read(128 << 30)
    assert tuner._best == 2
    tuner = Tuner(16, least=4)
    Device(tuner, at(d4=500, d8=500, d16=500, d32=500)).read(128 << 30)
    assert tuner._best == 4


def test_readers_that_are_the_limit_teach_nothing() -> None:
    tuner = Tuner(4)
    Device(tuner, at(d4=100)).read(8 << 30, queued=CHUNK_BYTES)
    assert tuner.depth == 4 and not tuner.learned


def test_depths_stay_in_bounds() -> None:
    tuner = Tuner(1)
    Device(tuner, {n: n * MIB for n in (1, 2, 4, 8, 16, 32)}).read(64 << 30)
    assert tuner._best == MAX_DEPTH


def test_small_files_are_not_probed(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file:
        assert probe(file.fileno()) == queue_depth.Depth(DEFAULT_DEPTH, 0, "default")


def test_a_probe_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(MIB))
    monkeypatch.setattr(queue_depth, "probe", lambda fd: queue_depth.Depth(3, 17, "measured"))
    kept = tmp_path / "run" / "depths.json"
    with path.open("rb") as file:
        assert Depths(kept).of(file.fileno()).depth == 3
        monkeypatch.setattr(queue_depth, "probe", lambda fd: pytest.fail("measured again"))
        assert Depths(kept).of(file.fileno()) == queue_depth.Depth(3, 17, "kept")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"1:2": 3}', '{"1:2": {"depth": "x"}}'])
def test_a_damaged_file_is_ignored(tmp_path: Path, text: str) -> None:
    kept = tmp_path / "depths.json"
    kept.write_text(text)
    depths = Depths(kept)
    depths.learned("1:2", 5, 6)
    assert json.loads(kept.read_text()) == {"1:2": {"depth": 5, "bytes_per_second": 6}}


def test_a_real_probe_ends(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 32)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        found = probe(file.fileno())
    assert 1 <= found.depth <= MAX_DEPTH


def test_one_disturbed_measurement_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a device can do its readers are left alone; here it does 3 GB/s, or what is told."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(queue_depth.LEAST_BYTES))
    slow, fast = [1.0, 2.0, 2.1, 2.2, 2.1], [3.0, 9.0, 3.0, 3.0, 3.0]
    for told in ([*slow, 3.0, 3.0, 3.0], [*fast, 3.0, 3.0, 3.0], [3.0] * 5 + [1.0, 3.0, 3.0]):
        speeds = iter(told)
        monkeypatch.setattr(
            queue_depth, "_speed", lambda fd, depth, at, size, speeds=speeds: (next(speeds), at)
        )
        with path.open("rb") as file:
            assert probe(file.fileno()).bytes_per_second == 3


def test_the_host_keeps_a_floor() -> None:
    total = 8 << 30
    memory = {"MemTotal": total, "MemAvailable": 1 << 30}
    assert host_window(memory) == int(((1 << 30) - int(total * 0.05)) * 0.25)
    assert host_window({"MemTotal": total, "MemAvailable": HOST_FLOOR_BYTES}) == 0
    assert host_window({}) == 0
