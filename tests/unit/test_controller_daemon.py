# SPDX-License-Identifier: Apache-2.0
"""The controller's process, without any socket or policy: its signal handlers, what it writes."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagecache_bpf import _run_dir
from pagecache_bpf.controller import daemon as daemons
from pagecache_bpf.controller import group_commit, one_at_a_time
from pagecache_bpf.controller.config import Config
from pagecache_bpf.controller.daemon import Daemon
from pagecache_bpf.controller.group_commit import GroupCommit
from tests.vm.kernel import wait_for


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """One that has opened nothing and answers nobody."""
    found = Daemon(None)
    yield found
    found.server.close()
    found.inspectors.close()


@pytest.mark.parametrize("handler", ["hang_up_signal", "stop"])
def test_a_signal_handler_takes_no_lock(daemon: Daemon, handler: str) -> None:
    """The thread that it interrupts may hold any lock: waiting for one would be for ever."""
    queues = daemon.server.queues
    locks: list[AbstractContextManager[object]] = [
        *(queues._lock, daemon._lock),
        *(daemon._commit._done, daemon.server._descriptors_lock),
    ]
    calls = threading.Thread(target=getattr(daemon, handler), daemon=True)
    with ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        calls.start()
        calls.join(60)
        assert not calls.is_alive(), "it waits for a lock of the thread that it has interrupted"
        assert not queues._waiting, "work was queued by the handler itself"


def test_a_hang_up_is_carried_out_by_the_loop(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One signal is one reload, in root's queue; others that came before it began are the same."""
    done = threading.Semaphore(0)
    calls = []

    def reload() -> dict[str, object]:
        calls.append(threading.current_thread().name)
        done.release()
        daemon.stop()
        return {}

    monkeypatch.setattr(daemon, "reload", reload)
    for _ in range(3):
        daemon.hang_up_signal()
    daemon.run()
    assert done.acquire(timeout=60)
    assert daemon.server.queues.wait_idle(60)
    assert calls == ["queue-root"]


def test_s16_what_serve_writes_is_roots_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may reach the socket's directory: a log that a library writes there is not theirs."""
    written = tmp_path / "x-load.log"

    class Quick:
        def __init__(self, config: Config, persist: bool) -> None:
            self.config = config

        def start(self) -> None:
            written.write_text("what the verifier said")

        def run(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(one_at_a_time, "RUN_DIR", tmp_path)
    monkeypatch.setattr(one_at_a_time, "LOCK", tmp_path / "agent.lock")
    monkeypatch.setattr(daemons, "Daemon", Quick)
    handlers = {number: signal.getsignal(number) for number in (15, 2, 1)}
    mask = os.umask(0o022)
    try:
        daemons.serve(Config(), False)
    finally:
        os.umask(mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o600, 0o600]


def test_s16_clients_find_a_socket_that_is_elsewhere(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a link where they look first; or the environment names it."""
    monkeypatch.setattr(daemons, "RUN_DIR", tmp_path)
    monkeypatch.setattr(_run_dir, "RUN_DIR", tmp_path)
    monkeypatch.delenv("PAGECACHE_BPF_SOCKET", raising=False)
    elsewhere = tmp_path / "elsewhere.sock"
    daemon._link(elsewhere)
    assert os.readlink(_run_dir.socket_path()) == str(elsewhere)
    monkeypatch.setenv("PAGECACHE_BPF_SOCKET", "/run/other.sock")
    assert _run_dir.socket_path() == Path("/run/other.sock")


# --- what is written down ---


def test_who_changes_something_waits_until_it_is_written() -> None:
    """Many at once are written together; none returns before what it changed is there."""
    changed: set[int] = set()
    written: set[int] = set()
    writings = []
    began, go_on = threading.Event(), threading.Event()

    def write() -> None:
        seen = set(changed)
        began.set()
        assert go_on.wait(60)
        writings.append(seen)
        written.update(seen)

    commit = GroupCommit(write)
    missing = []

    def change(number: int) -> None:
        changed.add(number)
        commit.now()
        if number not in written:
            missing.append(number)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(20)]
    threads[0].start()
    assert began.wait(60)
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: commit._wanted == 20, "all to wait")
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert missing == [] and len(writings) == 2


def test_what_may_wait_is_written_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand tags one by one are not ten thousand times all tags."""
    clock = [0.0]
    monkeypatch.setattr(group_commit, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    writings = []

    def write() -> None:
        writings.append(clock[0])
        clock[0] += 0.01

    commit = GroupCommit(write)
    for _ in range(1000):
        commit.soon()
        clock[0] += 0.001
    assert 2 <= len(writings) <= 1 + clock[0] * group_commit.SHARE / 0.01
    assert not commit.due(clock[0]) or commit.due(clock[0] + 1)
    commit.soon()
    assert commit.due(clock[0] + 1)
    commit.now()
    assert not commit.due(clock[0] + 10)


def test_a_writing_that_fails_is_not_waited_for() -> None:
    def write() -> None:
        raise OSError("the disk is full")

    commit = GroupCommit(write)
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            commit.now()
