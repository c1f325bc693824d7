# SPDX-License-Identifier: Apache-2.0
"""When what serves a load is started: not for one that is over before that has ended."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pagecache_bpf as pc
from pagecache_bpf.kernel.residency import CHUNK, PIECE, ChunkLook, resident_bytes
from pagecache_bpf.loads import worthwhile
from pagecache_bpf.loads.request import LoadOver, LoadRequest, Starting
from tests.unit.test_api import TOTAL, _unprivileged, model, resident

__all__ = ["_unprivileged", "model"]  # fixtures

GIB = 1 << 30


@dataclass
class _Load:
    """A load that goes as it is written down: bytes in the page cache at each look."""

    cached: list[int]
    looks: int = 0
    now: float = 0.0
    hurried_at: int = -1
    pauses: list[float] = field(default_factory=list)

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.pauses.append(seconds)
        self.looks += 1
        if self.looks == self.hurried_at:
            return True
        if self.looks == len(self.cached):
            raise LoadOver
        return False


def _waits(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    size: int,
    cached: list[int],
    *,
    root: bool,
    hurried_at: int = -1,
    agent: bool = False,
    **wishes: Any,
) -> tuple[bool | None, _Load]:
    """What is said of a load (None: it was over first), and how often it was looked at."""
    load = _Load(cached, hurried_at=hurried_at)

    @dataclass
    class Files:
        files: tuple[Path, ...] = ()
        size: int = 0

    @dataclass
    class Seen:
        known: bool = True
        resident: int = 0

    monkeypatch.setattr(worthwhile, "resident_of", lambda files: load.cached[load.looks])
    monkeypatch.setattr(worthwhile, "time", SimpleNamespace(monotonic=lambda: load.now))
    # A directory that has no agent.sock, or a place where one is.
    run_dir = tmp_path / ("with" if agent else "without")
    run_dir.mkdir(exist_ok=True)
    if agent:
        (run_dir / "agent.sock").touch()
    monkeypatch.setattr(worthwhile, "RUN_DIR", run_dir)
    request: Any = LoadRequest(Files((), size), **wishes)  # type: ignore[arg-type]
    seen: Any = Seen(resident=cached[0])
    starting: Any = load
    try:
        return worthwhile.wait_until_it_pays(request, seen, starting, root), load
    except LoadOver:
        return None, load


def test_a_load_that_is_nearly_over_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At 2 GB/s a fifth of a second is left, and no attach takes less."""
    fast = [part * GIB // 5 for part in range(6)]
    for root, expected in ((False, False), (True, None)):
        assert _waits(monkeypatch, tmp_path, GIB, fast, root=root)[0] is expected
    half = [GIB - (GIB >> 2), GIB - (GIB >> 4), GIB]
    assert _waits(monkeypatch, tmp_path, GIB, half, root=False)[0] is None


def test_a_long_load_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = [part * GIB // 50 for part in range(51)]  # 0.2 GB/s: five seconds
    told, load = _waits(monkeypatch, tmp_path, GIB, slow, root=True)
    assert told is True and load.looks == 2
    told, load = _waits(monkeypatch, tmp_path, GIB, slow, root=False)
    assert told is False and load.looks == 2
    # 1.4 s are left: too little for an agent that has to be started, enough for one that runs.
    late = [GIB - GIB * part // 50 for part in (16, 15, 14, 13)]
    assert _waits(monkeypatch, tmp_path, GIB, late, root=True)[0] is None
    assert _waits(monkeypatch, tmp_path, GIB, late, root=True, agent=True)[0] is True


def test_a_reader_that_has_just_begun_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It came at the end of the first 0.1 s, and is much faster than it seems from there."""
    fast = [0, GIB >> 5, GIB - (GIB >> 4), GIB]
    for root in (False, True):
        assert _waits(monkeypatch, tmp_path, GIB, fast, root=root)[0] is None


def test_what_is_read_before_the_reader_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever does something else first has a small model read by threads, a large by a policy."""
    idle = [0] * 50
    assert _waits(monkeypatch, tmp_path, GIB, idle, root=True)[0] is False
    assert _waits(monkeypatch, tmp_path, 16 * GIB, idle, root=True)[0] is True
    assert _waits(monkeypatch, tmp_path, 16 * GIB, idle, root=False)[0] is False


def test_a_cached_model_is_hardly_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told, load = _waits(monkeypatch, tmp_path, GIB, [GIB] * 20, root=True)
    assert told is None and min(load.pauses) >= 1
    # Something of it goes.
    told, load = _waits(
        monkeypatch, tmp_path, 8 * GIB, [8 * GIB, 8 * GIB, GIB, GIB, GIB], root=False
    )
    assert told is False and load.looks == 2


@pytest.mark.parametrize(
    "wish", [{"policy": "maio"}, {"budget": 1 << 20}, {"template": "x"}, {"record": Path("x")}]
)
def test_who_says_how_is_served_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wish: dict[str, Any]
) -> None:
    told, load = _waits(monkeypatch, tmp_path, GIB, [GIB] * 3, root=True, **wish)
    assert told is True and not load.looks


def test_who_waits_for_it_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told, load = _waits(monkeypatch, tmp_path, GIB, [GIB] * 3, root=True, hurried_at=1)
    assert told is True and load.looks == 1
    starting = Starting()
    starting.hurry()
    assert starting.wait(60)
    starting.cancel()
    with pytest.raises(LoadOver):
        starting.wait(60)


def test_nothing_is_started_for_a_cached_model_until_somebody_waits(model: Path) -> None:
    for path in model.iterdir():
        path.read_bytes()
    with pc.load(model) as load:
        time.sleep(2 * worthwhile.LOOK_SECONDS)  # there is no event for nothing happening
        names = {thread.name for thread in threading.enumerate()}
        assert "window" not in names and not any(name.startswith("prefetch") for name in names)
        assert load.report().engine == "none" and "being started" in load.report().why
        assert load.ready(20) and load.report().engine == "unprivileged"
    assert resident(model) >= TOTAL


def test_a_look_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    """Chunks that are cached here and there, and a long part that is not, as cachestat has it."""
    path = tmp_path / "model.gguf"
    size = 5 * PIECE + 3 * CHUNK + 777
    with path.open("wb") as out:
        out.truncate(size)
        os.fsync(out.fileno())
    cached = {0, 3, 4, 5 * PIECE // CHUNK, size // CHUNK}
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for number in cached:
            os.pread(fd, CHUNK, number * CHUNK)
        look = ChunkLook(fd)
        assert not look.go_on(fd, time.monotonic())
        part = look.result()
        assert (part.resident, part.numbers) == (0, frozenset())
        assert look.go_on(fd) and look.go_on(fd, 0.0)
        whole = look.result()
        assert whole.known and whole.numbers == frozenset(cached)
        assert whole.resident == resident_bytes(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
        while os.read(fd, 1 << 20):
            pass
        everything = ChunkLook(fd)
        assert everything.go_on(fd) and everything.result().numbers is None
    finally:
        os.close(fd)
