# SPDX-License-Identifier: Apache-2.0
"""The controller's process: what its signal handlers may do, without any socket or policy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

import pytest

from pagecache_bpf.controller.daemon import Daemon


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
        *(daemon._saving, daemon.server._descriptors_lock),
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
