# SPDX-License-Identifier: Apache-2.0
"""What the agent knows of the processes it reads for."""

from __future__ import annotations

import os
import subprocess

import pytest

from pagecache_bpf.agent import readers
from pagecache_bpf.agent.readers import Readers
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.cgroups import Level, Memory

MIB = 1 << 20


class Told(dict[int, "int | None"]):
    """Windows in pages, by process."""

    def change(self, tgid: int, pages: int | None) -> None:
        self[tgid] = pages


def bounded(headroom: int) -> Memory:
    return Memory(2, "/pod", (Level("/pod", headroom, None, 0, 0),))


def test_a_window_is_a_share_of_the_tightest_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "of_process", lambda pid: bounded(40 * MIB))
    told = Told()
    assert Readers(4096, told.change).get(os.getpid()).window == 10 * MIB
    assert told == {os.getpid(): 10 * MIB // 4096}


def test_room_that_comes_back_opens_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    room = 0
    monkeypatch.setattr(cgroups, "of_process", lambda pid: bounded(room))
    monkeypatch.setattr(readers, "STALE_SECONDS", -1.0)
    told = Told()
    known = Readers(4096, told.change)
    assert known.get(os.getpid()).window == 0
    room = 40 * MIB
    known.refresh()
    assert told == {os.getpid(): 10 * MIB // 4096}


def test_one_that_has_ended_is_forgotten() -> None:
    told = Told()
    known = Readers(4096, told.change)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert known.get(process.pid).window is not None
    known.refresh()
    assert told[process.pid] is None


def test_one_that_asks_no_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    known = Readers(4096, told.change)
    known.get(os.getpid())
    monkeypatch.setattr(readers, "FORGET_SECONDS", -1.0)
    known.refresh()
    assert told == {os.getpid(): None}


def test_its_own_cgroup_needs_no_move() -> None:
    place = Readers(4096, Told().change).place(os.getpid(), 0, "1:2")
    assert place.cgroup is None and place.device == "1:2"
