# SPDX-License-Identifier: Apache-2.0
"""Time of the processor is shared out among users, and what they leave behind does not pile up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc.connection import Connection
from pagecache_bpf.ipc.user_queues import (
    MACHINE_SHARE,
    REST_SECONDS,
    SAVED_SECONDS,
    SHARE,
    UserQueues,
)
from tests.unit.test_controller_server import Handler, Running, running
from tests.vm.kernel import wait_for

__all__ = ["running"]  # a fixture


def until_set(gate: threading.Event) -> Callable[[], None]:
    """Work that lasts until then."""

    def wait() -> None:
        gate.wait(60)

    return wait


def test_s6_who_has_taken_too_much_rests_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    queues, rested = UserQueues(), threading.Event()
    done: list[str] = []
    monkeypatch.setattr(
        queues, "_rest", lambda key, now: 0.05 if key == "greedy" and not rested.is_set() else 0.0
    )
    queues.submit("greedy", lambda: done.append("greedy"))
    queues.submit("modest", lambda: done.append("modest"))
    wait_for(lambda: done == ["modest"], "the other one to be served", 60)
    rested.set()
    wait_for(lambda: done == ["modest", "greedy"], "the first one to be served", 60)
    assert queues.wait_idle(60)


def test_s6_rests_that_end_are_seen_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread that is, and however many of its like have other work."""
    monkeypatch.setattr("pagecache_bpf.ipc.user_queues._IDLE_SECONDS", 3600.0)
    queues = UserQueues()
    resting = {"a", "b", "c"}
    done: list[str] = []
    gate = threading.Event()
    for number in range(6):  # so many threads, which are idle afterwards
        queues.submit(number, until_set(gate))
    wait_for(lambda: queues.running() == 6, "all threads to be there", 60)
    monkeypatch.setattr(queues, "_rest", lambda key, now: 0.05 if key in resting else 0.0)
    for key in sorted(resting):
        queues.submit(key, lambda key=key: done.append(key))  # type: ignore[misc]
    gate.set()
    for key in ("c", "a", "b"):
        resting.discard(key)
        wait_for(lambda key=key: key in done, f"{key} to be served", 60)  # type: ignore[misc]
    assert done == ["c", "a", "b"]
    assert queues.wait_idle(60)


def test_threads_that_are_not_needed_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is work all the time: it goes to the one that was idle last."""
    monkeypatch.setattr("pagecache_bpf.ipc.user_queues._IDLE_SECONDS", 0.5)
    queues = UserQueues()
    gate = threading.Event()
    for number in range(8):
        queues.submit(number, until_set(gate))
    wait_for(lambda: queues.running() == 8, "all threads to be there", 60)
    gate.set()

    def one_is_left() -> bool:
        done = threading.Event()
        queues.submit("a", done.set)
        assert done.wait(60)
        return queues._threads == 1

    wait_for(one_is_left, "the others to end", 60)


def test_s6_how_long_one_rests_follows_from_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pagecache_bpf.ipc.user_queues.time.monotonic", lambda: now)
    queues = UserQueues(processors=64)
    queues._running = {"a": 1, "b": 1}
    queues._charge("a", SAVED_SECONDS)
    assert queues._rest("a", now) <= 0  # it had saved that up
    queues._charge("a", 0.1)
    assert queues._rest("a", now) == pytest.approx(0.1 / (SHARE / 2))
    now += 0.1 / (SHARE / 2)
    assert queues._rest("a", now) == pytest.approx(0)
    queues._charge("a", 1000.0)
    assert queues._rest("a", now) == pytest.approx(REST_SECONDS)
    assert queues._rest("b", now) == 0
    for number in range(1000):  # users who have gone are forgotten
        queues._charge(number, 0.0)
    assert len(queues._allowances) < 200


@pytest.mark.parametrize(
    ("processors", "users", "share"),
    [(2, 2, 2 * MACHINE_SHARE), (2, 5, 2 * MACHINE_SHARE), (2, 1, SHARE), (64, 2, SHARE)],
)
def test_s6_a_crowd_takes_a_small_part_of_a_small_machine(
    monkeypatch: pytest.MonkeyPatch, processors: int, users: int, share: float
) -> None:
    """A user alone has the quarter of a processor there, too."""
    now = 1000.0
    monkeypatch.setattr("pagecache_bpf.ipc.user_queues.time.monotonic", lambda: now)
    queues = UserQueues(processors=processors)
    queues._running = dict.fromkeys(range(users), 1)
    queues._charge(0, SAVED_SECONDS + 0.01)
    assert queues._rest(0, now) == pytest.approx(0.01 / (share / users))


def test_s6_time_that_is_waited_costs_nothing() -> None:
    queues = UserQueues()
    queues.submit("a", lambda: time.sleep(0.2))
    assert queues.wait_idle(60)
    assert queues._rest("a", time.monotonic()) <= 0


def test_s4_hanging_up_is_not_held_up_by_requests_that_hang(
    running: Running,
    become: Callable[[int], None],
) -> None:
    handler = Handler()
    public = running.listen(handler)
    become(1001)
    with ExitStack() as crowd:
        stuck = [crowd.enter_context(public()) for _ in range(6)]
        for client in stuck:
            client._send(b"wait\n", [])
        wait_for(lambda: running.server.queues.running() == 4, "every thread to be taken", 60)
        with public() as leaves:
            leaves._send(b"x", [0] * 4)
        wait_for(lambda: len(handler.left) == 1, "the one that has gone to be noticed", 60)
        wait_for(lambda: not running.server._descriptors, "what it sent to be closed", 60)
        handler.gate.set()


def test_s5_a_place_is_free_when_nothing_is_left_of_who_had_it(
    running: Running,
    become: Callable[[int], None],
) -> None:
    """Else a user who comes and goes has any number of files in the controller at a time."""
    cleared = threading.Event()

    class Slow(Handler):
        def gone(self, connection: Connection) -> None:
            cleared.wait(60)
            super().gone(connection)

    public = running.listen(Slow(connections_per_user=2))
    become(1001)
    for _ in range(2):
        with public() as client:
            client.request("x")
    wait_for(lambda: not running.server.connections, "both to be gone", 60)
    with public() as late, pytest.raises(PagecacheError, match="does not take more"):
        late.request("x")
    become(1002)
    with public() as other:
        other.request("x")
    cleared.set()
    become(1001)
    wait_for(lambda: not any(running.server._owners.values()), "the places to be free", 60)
    with public() as client:
        client.request("x")
