# SPDX-License-Identifier: Apache-2.0
"""Pressure as engine agent sees it: triggers, cgroups, and who is asked in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagecache_bpf.agent.pressure import (
    AGAIN_SECONDS,
    MAX_CGROUPS,
    WANT_BYTES,
    PressureWatch,
    Short,
    _Source,
    ask_all,
)
from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel import cgroups


def test_files_are_asked_in_turn_until_enough_is_given_up() -> None:
    asked: list[tuple[str, int, int]] = []

    def file(name: str, gives: tuple[int, int]):  # type: ignore[no-untyped-def]
        def ask(pages: int, cgroup: int, turn: int) -> int:
            assert cgroup == 7
            asked.append((name, pages, turn))
            return min(gives[turn], pages)

        return ask

    files = [file("a", (0, 3)), file("b", (4, 9)), file("c", (0, 9))]
    assert ask_all(Short(7, 10 * 4096), 4096, files) == 10
    assert asked == [("a", 10, 0), ("b", 10, 0), ("c", 6, 0), ("a", 6, 1), ("b", 3, 1)]
    assert ask_all(Short(7, 4096), 4096, []) == 0


def test_what_this_machine_lacks_is_said(tmp_path: Path) -> None:
    watch = PressureWatch(tmp_path / "none", tmp_path)
    assert len(watch.missing) == 2
    assert "No such file" in watch.missing[0] and "version 1" in watch.missing[1]
    assert watch.check() == []
    watch.watch(tmp_path / "a" / "b")  # no such cgroup: nothing to watch
    watch.watch_process(os.getpid())
    watch.watch_process(2**22 + 1)
    watch.close()


GIB = 1 << 30


def full(used: int, limit: int | None) -> cgroups.Memory:
    return cgroups.Memory(1, "/x", (cgroups.Level("/x", limit, None, used, used),))


@pytest.mark.parametrize(
    ("available", "version", "memory", "short"),
    [
        (20 * GIB, 1, full(GIB, 2 * GIB), False),  # somebody else's cgroup is full
        (20 * GIB, 1, full(GIB, None), False),
        (20 * GIB, 1, None, False),  # the reader has ended
        (20 * GIB, 1, full(2 * GIB - 4096, 2 * GIB), True),
        (20 * GIB, 2, full(2 * GIB, 2 * GIB), False),  # it has a trigger of its own
        (2 * GIB, 2, None, True),
        (2 * GIB, 1, full(GIB, None), True),
    ],
)
def test_stalls_of_others_take_nothing_from_a_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    version: int,
    memory: cgroups.Memory | None,
    short: bool,
) -> None:
    def of_process(pid: int) -> cgroups.Memory:
        if memory is None:
            raise UsageError(f"there is no process {pid}")
        return memory

    numbers = {"MemTotal": 24 * GIB, "MemAvailable": available}
    monkeypatch.setattr(cgroups, "host_memory", lambda: numbers)
    monkeypatch.setattr(cgroups, "of_process", of_process)
    if version == 2:
        (tmp_path / "cgroup.controllers").write_text("memory\n")
    watch = PressureWatch(tmp_path / "none", tmp_path)
    watch.watch_process(os.getpid())
    found = watch._judge(_Source(-1, None))
    assert found == (Short(0, WANT_BYTES) if short else None)


def test_s16_a_number_that_comes_round_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process of that number may be in another cgroup, which is watched then, too."""
    watch = PressureWatch(tmp_path / "none", tmp_path)
    watched: list[Path] = []
    monkeypatch.setattr(watch, "watch", watched.append)
    now = 1000.0
    monkeypatch.setattr("pagecache_bpf.agent.pressure.time.monotonic", lambda: now)
    watch.watch_process(os.getpid())
    watch.watch_process(os.getpid())
    assert len(watched) == 1
    now += AGAIN_SECONDS
    watch.watch_process(os.getpid())
    assert len(watched) == 2
    for pid in range(2**22 + 1, 2**22 + 5000):  # no process has such a number
        watch.watch_process(pid)
    assert len(watch._seen) <= MAX_CGROUPS
    watch.close()
