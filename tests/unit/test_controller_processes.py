# SPDX-License-Identifier: Apache-2.0
"""The processes of loads, with real processes and descriptors; lost events alone are made up."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pagecache_bpf.controller import processes
from pagecache_bpf.controller.processes import CONNECTOR, PIDFD, DiskDelays, Process, ProcessWatch
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.kernelfs import LIVE
from tests.vm.kernel import wait_for


class Told:
    """What a watch has told, from whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids: list[int] = []

    def __call__(self, pid: int) -> None:
        with self._lock:
            self._pids.append(pid)

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return list(self._pids)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(params=[True, False], ids=["connector", "pidfd"])
def watch(request: pytest.FixtureRequest, told: Told) -> Iterator[ProcessWatch]:
    """A watch of each kind; without the right to the connector both are of the second."""
    made = ProcessWatch(told, connector=request.param)
    assert (made.how == CONNECTOR) == (made.why == "")
    assert request.param or made.how == PIDFD
    yield made
    made.close()


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    made: list[subprocess.Popen[bytes]] = []
    yield made
    for process in made:
        process.kill()
        process.wait()


def sleeper(made: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    made.append(subprocess.Popen(["sleep", "1000"]))
    return made[-1]


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


Sleepers = list[subprocess.Popen[bytes]]


def test_an_end_is_told_once(watch: ProcessWatch, told: Told, sleepers: Sleepers) -> None:
    first, second = sleeper(sleepers), sleeper(sleepers)
    assert watch.add(first.pid) and watch.add(second.pid)
    end(first)
    wait_for(lambda: told.pids == [first.pid], "the first end to be told", 60)
    end(second)
    wait_for(lambda: told.pids == [first.pid, second.pid], "the second, too", 60)


def test_one_that_is_gone_is_not_watched(watch: ProcessWatch, sleepers: Sleepers) -> None:
    gone = sleeper(sleepers)
    end(gone)
    assert not watch.add(gone.pid)


def test_a_load_that_ends_takes_its_watch_along(
    watch: ProcessWatch, told: Told, sleepers: Sleepers
) -> None:
    """Two loads of a process: it is watched until both are over."""
    both, neither, last = (sleeper(sleepers) for _ in range(3))
    for process in (both, both, neither, neither, last):
        assert watch.add(process.pid)
    watch.remove(both.pid)
    watch.remove(neither.pid)
    watch.remove(neither.pid)
    watch.remove(neither.pid)  # once more is no error
    end(neither)
    end(both)
    wait_for(lambda: both.pid in told.pids, "the one that is still watched", 60)
    end(last)
    wait_for(lambda: last.pid in told.pids, "the last one", 60)
    assert sorted(told.pids) == sorted([both.pid, last.pid])


def test_descriptors_are_closed(told: Told, sleepers: Sleepers) -> None:
    before = set(os.listdir("/proc/self/fd"))
    made = ProcessWatch(told, connector=False)
    process = sleeper(sleepers)
    passed = os.pidfd_open(process.pid)
    assert made.add(process.pid, passed)
    assert made.add(process.pid)  # a second descriptor, which is not needed
    made.remove(process.pid)
    os.fstat(passed)
    made.remove(process.pid)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(passed)
    made.add(process.pid)
    made.close()
    assert set(os.listdir("/proc/self/fd")) == before


class LostEvents:
    """The kernel's process events, of which some were lost: nothing says whose."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)

    def lose(self) -> None:
        os.write(self._write, b"\0")

    def fileno(self) -> int:
        return self._read

    def ended(self) -> set[int] | None:
        os.read(self._read, 100)
        return None

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def test_after_lost_events_every_process_is_looked_at(
    told: Told, sleepers: Sleepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = LostEvents()
    monkeypatch.setattr(processes, "ExitEvents", lambda: events)
    made = ProcessWatch(told)
    assert made.how == CONNECTOR
    gone, living = sleeper(sleepers), sleeper(sleepers)
    assert made.add(gone.pid) and made.add(living.pid)
    end(gone)
    events.lose()
    wait_for(lambda: told.pids == [gone.pid], "the end to be told", 60)
    made.close()
    assert told.pids == [gone.pid]


def test_without_the_connector_it_says_why(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise UnsupportedError("process events cannot be had", "the kernel has none")

    monkeypatch.setattr(processes, "ExitEvents", refused)
    made = ProcessWatch(told)
    assert (made.how, made.why) == (PIDFD, "the kernel has none")
    made.close()


ELSEWHERE = """
from pagecache_bpf.controller.processes import ProcessWatch
made = ProcessWatch(print)
print(made.how, made.why, sep=": ")
made.close()
"""


def test_in_a_network_of_its_own_it_says_so_once() -> None:
    """As in a pod: the connector is not there, and asyncio logs nothing of that."""
    command = ["unshare", "--net", sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip(f"no network of its own: {done.stderr.strip()}")
    assert done.stdout == f"{PIDFD}: this is not the first network namespace\n"
    assert done.stderr == ""


def test_a_process_lives_until_it_has_ended(sleepers: Sleepers) -> None:
    process = sleeper(sleepers)
    held = Process(process.pid)
    assert held.alive
    process.kill()
    wait_for(lambda: not held.alive, "the end, before it is waited for", 60)
    process.wait()
    held.close()
    held.close()
    assert not held.alive and held.fileno() == -1
    with pytest.raises(OSError, match="No such process"):
        Process(process.pid)


def test_delays_that_are_not_counted_are_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    read = LIVE.read
    switch = "/proc/sys/kernel/task_delayacct"
    monkeypatch.setattr(
        type(LIVE), "read", lambda self, path: "0" if str(path) == switch else read(path)
    )
    delays = DiskDelays()
    assert delays.why and delays.of(os.getpid()) is None
    delays.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="delay accounting is asked for by root")
def test_delays_are_those_of_proc() -> None:
    """Field 42 of /proc/PID/stat has the same time in clock ticks."""
    delays = DiskDelays()
    if delays.why:
        switch = Path("/proc/sys/kernel/task_delayacct")
        assert not switch.exists() or switch.read_text().strip() == "0", delays.why
    else:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[39])
        found = delays.of(os.getpid())
        # The main thread's time is a part of that of all threads.
        assert found is not None and found >= ticks * 10**9 // os.sysconf("SC_CLK_TCK")
        assert delays.of(2**22) is None
    delays.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="process events and delays are asked for by root")
def test_no_event_loop_is_left_to_the_garbage_collector() -> None:
    """Of pyroute2's, whichever thread makes, uses and closes them; it may find them half closed."""
    made: list[DiskDelays | processes.ExitEvents] = []

    def make() -> None:
        made.append(DiskDelays())
        with suppress(UnsupportedError):  # not the first network namespace
            made.append(processes.ExitEvents())

    def ask() -> None:
        delays = made[0]
        assert isinstance(delays, DiskDelays)
        delays.why = ""  # also where the kernel does not count them
        delays.of(os.getpid())

    def loops() -> dict[int, asyncio.AbstractEventLoop]:
        known = (found for found in gc.get_objects() if isinstance(found, asyncio.BaseEventLoop))
        return {id(loop): loop for loop in known}

    before = loops()
    for work in (make, ask, ask):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    opened = [loop for number, loop in loops().items() if number not in before]
    for source in made:
        source.close()
    assert opened and all(loop.is_closed() for loop in opened)
