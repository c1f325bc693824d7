# SPDX-License-Identifier: Apache-2.0
"""Parts of the controller by themselves; only the kernel's side of them is a fake."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.controller import node_hints, saved_state
from pagecache_bpf.controller.client_files import check_descriptor, template_of
from pagecache_bpf.controller.engine_control import AGENT, STRUCT_OPS, PlacedTag
from pagecache_bpf.controller.node_hints import NodeHints
from pagecache_bpf.controller.prefetch_queues import PrefetchQueues
from pagecache_bpf.controller.watchdog import PATIENCE_SECONDS, Watchdog
from pagecache_bpf.errors import UsageError
from pagecache_bpf.ipc.public_protocol import TEMPLATE_BYTES
from pagecache_bpf.ipc.user_queues import UserQueues
from pagecache_bpf.kernel import bpf_maps, pid_namespace
from pagecache_bpf.kernel.file_key import key_of
from tests.vm.kernel import wait_for

OWNER = (1001, False)
SIZE = 64 << 20


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a file with nothing on the disk."""
    path = tmp_path / "w"
    path.touch()
    os.truncate(path, SIZE)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def held(fd: int) -> int:
    """How many descriptors of a file this process has."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return links.count(path)


# --- client_files ---


@pytest.mark.parametrize("size", [1, TEMPLATE_BYTES])
def test_a_template_that_came_along(tmp_path: Path, size: int) -> None:
    path = tmp_path / "template"
    path.touch()
    os.truncate(path, size)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert template_of([fd], None) == fd
        os.truncate(path, TEMPLATE_BYTES + 1)
        with pytest.raises(UsageError, match="the template was refused"):
            template_of([fd], None)
    finally:
        os.close(fd)
    assert template_of([], None) is None


# --- prefetch_queues ---


@pytest.fixture
def queues() -> Iterator[PrefetchQueues]:
    started: list[int] = []
    found = PrefetchQueues(started.append)
    yield found
    found.close()
    assert all(not Path(f"/proc/{pid}").exists() for pid in started)


def ask(queues: PrefetchQueues, connection: int, fd: int, times: int = 1) -> tuple[int, int]:
    file = check_descriptor(fd, None)
    extents = [[0, SIZE]] * times
    return queues.submit(OWNER, connection, None, fd, file, extents, -1, None)


def test_s9_prefetching_ends_with_its_connection(queues: PrefetchQueues, weights: int) -> None:
    """What is queued is forgotten, what is being read is finished, and no descriptor stays."""
    assert ask(queues, 7, weights, times=1000) == (1000 * SIZE, 0)
    assert ask(queues, 7, weights, times=10) == (10 * SIZE, 0)
    assert ask(queues, 8, weights) == (SIZE, 0)
    queues.cancel(7)
    wait_for(lambda: queues.queued_bytes() == 0, "the rest to be settled", 60)
    wait_for(lambda: held(weights) == 1, "every descriptor but ours to be closed", 60)


def test_s5_a_file_is_held_once_and_files_of_a_user_are_bounded(
    queues: PrefetchQueues, weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "_most_files", 1)
    # Nothing is settled meanwhile: the pool takes it and reads nothing.
    monkeypatch.setattr("pagecache_bpf.agent.workers.Pools.submit", lambda *_: None)
    for _ in range(5):
        assert ask(queues, 7, weights) == (SIZE, 0)
    assert held(weights) == 2
    other = tmp_path / "other"
    other.touch()
    os.truncate(other, SIZE)
    with other.open("rb") as file:
        assert ask(queues, 7, file.fileno()) == (0, SIZE)
    assert queues.queued_bytes() == 5 * SIZE


# --- watchdog ---


def test_s1_the_manager_hears_nothing_while_requests_wait_for_ever() -> None:
    """The loop goes on turning; a lock that requests take is held."""
    lock, queues = threading.RLock(), UserQueues()
    queues.reserve("root")
    told: list[str] = []
    watchdog = Watchdog(queues, "root", lock, 1.0, told.append)
    now = watchdog._told + 1
    watchdog.tick(now)
    assert told == ["WATCHDOG=1"]
    wait_for(lambda: not watchdog._asked, "the probes to come back", 60)
    with lock:
        watchdog.tick(now + 1)
        assert len(told) == 2
        watchdog.tick(now + 1 + PATIENCE_SECONDS)
        assert len(told) == 2
        watchdog.tick(now + 2 + PATIENCE_SECONDS)
        assert len(told) == 2
    wait_for(lambda: not watchdog._asked, "the probes to come back", 60)
    watchdog.tick(now + 3 + PATIENCE_SECONDS)
    assert len(told) == 3


# --- node_hints ---


class Hinted:
    """An agent that writes down hints."""

    def __init__(self) -> None:
        self.hints: dict[int, int] = {}

    def hint(self, pid: int, node: int | None) -> None:
        if node is None:
            del self.hints[pid]
        else:
            self.hints[pid] = node


def test_a_hint_goes_with_the_last_load_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pid_namespace, "is_first", lambda: True)
    agent = Hinted()
    engines: Any = SimpleNamespace(
        lock=threading.RLock(),
        attached=lambda: {"maio": AGENT},
        service=SimpleNamespace(agents={"maio": agent}),
    )
    hints = NodeHints(engines)
    assert not hints.give("a", 7, "maio", AGENT, None)  # unknown is no hint
    assert hints.give("a", 7, "maio", AGENT, 1) and hints.give("b", 7, "maio", AGENT, 1)
    assert hints.give("c", 8, "maio", AGENT, 0)
    hints.forget("a", 7)
    assert agent.hints == {7: 1, 8: 0}
    hints.forget("b", 7)
    hints.forget("b", 7)
    assert agent.hints == {8: 0}


def test_devices_near_several_nodes_are_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_hints, "nodes", lambda: [0, 1])
    assert node_hints.node_of([{"node": 1}, {"node": 1}]) == 1
    unclear: list[list[dict[str, Any]]] = [[], [{"node": 0}, {"node": 1}], [{"node": None}], [{}]]
    for devices in unclear:
        assert node_hints.node_of(devices) is None


# --- saved_state ---


class Service:
    """Policies of engine agent, and what they are asked."""

    def __init__(self, agents: dict[str, Any]) -> None:
        self.agents = agents
        self.done: list[tuple[Any, ...]] = []

    def attach(self, policy: str, built: str, knobs: dict[str, int]) -> None:
        self.done.append(("attach", policy, knobs))

    def tag(self, fd: int, policy: str, model: str, path: str, replace: bool) -> None:
        self.done.append(("tag", key_of(fd), policy, model))


@pytest.fixture
def restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[Path], None]], tuple[Service, list[str], bytes]]]:
    """Saves a policy with a tag, changes the file, and restores."""
    monkeypatch.setattr("pagecache_bpf.policy.catalog.agent_object", lambda info: "object")

    def run(change: Callable[[Path], None]) -> tuple[Service, list[str], bytes]:
        file, state = tmp_path / "w", tmp_path / "state.json"
        file.write_bytes(b"weights")
        with file.open("rb") as opened:
            key = key_of(opened.fileno())
        tag = SimpleNamespace(model="m", path=str(file))
        agent = SimpleNamespace(
            exit=None, info=SimpleNamespace(object=None), knobs={"max_window_mib": 8}
        )
        agent.tags = {key: tag, b"of a load": tag}
        service: Any = Service({"sequential": agent})
        saved_state.save(service, {b"of a load"}, state)
        assert state.stat().st_mode & 0o777 == 0o600
        change(file)
        fresh: Any = Service({})
        return fresh, saved_state.restore(fresh, state), key

    yield run


def test_what_was_saved_is_attached_and_tagged_again(restored: Any) -> None:
    service, failed, key = restored(lambda file: None)
    assert failed == []
    assert service.done == [
        ("attach", "sequential", {"max_window_mib": 8}),
        ("tag", key, "sequential", "m"),
    ]


@pytest.mark.parametrize("kind", ["other", "fifo", "link", "gone"])
def test_s1_a_file_that_was_replaced_is_not_tagged_again(restored: Any, kind: str) -> None:
    def change(file: Path) -> None:
        file.rename(file.with_name("kept"))
        if kind == "other":
            file.write_bytes(b"other")
        elif kind == "fifo":
            os.mkfifo(file)
        elif kind == "link":
            file.symlink_to("/etc/shadow")

    service, failed, _ = restored(change)
    assert len(failed) == 1 and "was not tagged again" in failed[0]
    assert [done[0] for done in service.done] == ["attach"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"version": 99}', b'{"version": 1, "policies": 7}']
)
def test_a_state_that_is_none_is_told(tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "state.json"
    state.write_bytes(content)
    service: Any = Service({})
    (sentence,) = saved_state.restore(service, state)
    assert str(state) in sentence and service.done == []
    assert saved_state.restore(service, tmp_path / "none") == []


def test_policies_of_a_killed_controller_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    placed = PlacedTag(STRUCT_OPS, "maio", b"", (1, 2, 3, 4))
    saved_state.save_kernel({"maio": STRUCT_OPS, "noop": AGENT}, [placed], path)
    assert json.loads(path.read_bytes())["policies"] == ["maio"]
    untagged: list[PlacedTag] = []
    engines: Any = SimpleNamespace(
        own={}, untag=untagged.append, attached=lambda: {"maio": STRUCT_OPS}
    )
    saved_state.adopt_kernel(engines, path)
    assert engines.own == {"maio": STRUCT_OPS}
    assert [placed.identity for placed in untagged] == [(1, 2, 3, 4)]
    saved_state.save_kernel({}, [], path)
    assert not path.exists()


# --- what libbpf tells ---


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.E2BIG])
def test_s16_what_the_kernel_refuses_is_told_as_it_is(number: int) -> None:
    with pytest.raises(OSError) as caught:
        bpf_maps._checked(-number, "map 7")
    assert caught.value.errno == number
    assert isinstance(caught.value, PermissionError) == (number == errno.EPERM)
