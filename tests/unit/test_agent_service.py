# SPDX-License-Identifier: Apache-2.0
"""What the agent's process answers to root; a policy that runs is a fake, its catalog is real."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.agent import service as service_module
from pagecache_bpf.agent.service import Service
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.file_key import key_of
from pagecache_bpf.policy import exit_history
from pagecache_bpf.policy.observing import VARIABLE


class FakeHints:
    """The maps of a policy."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def as_json(self) -> dict[str, Any]:
        return {"maps": []}

    def elements(self, name: str) -> list[tuple[bytes, bytes]]:
        return list(self.values.items())

    def write(self, name: str, key: bytes, value: bytes) -> bool:
        if not value:
            return self.values.pop(key, None) is not None
        self.values[key] = value
        return True


class FakeAgent:
    """A policy, with everything but its programs."""

    def __init__(
        self,
        info: Any,
        obj: Path,
        knobs: dict[str, int],
        sizes: dict[str, int] | None = None,
        started: Callable[[int], None] = lambda pid: None,
    ) -> None:
        if not obj.name.endswith(".o"):
            raise UsageError(f"{obj} is no object")
        self.info, self.knobs = info, knobs
        self.missing = ["filemap_get_pages"]
        self.events = {"mm_filemap_fault": "raw_tp/mm_filemap_fault"}
        self.exit: tuple[int, str, str] | None = None
        self.exit_noted = False
        self.tags: dict[bytes, Any] = {}
        self.own_processes: set[int] = set()
        self.dropped: list[str] = []
        self.hints = FakeHints()
        self.closed = False

    def tag(self, fd: int, model: str, path: str, hold: bool) -> None:
        fields = {"model": model, "path": path, "hold": hold}
        self.tags[key_of(fd)] = SimpleNamespace(**fields, as_json=lambda: dict(fields))

    def untag(self, key: bytes) -> bool:
        return self.tags.pop(key, None) is not None

    def own(self, pid: int) -> None:
        self.own_processes.add(pid)

    def dropped_templates(self) -> list[str]:
        return self.dropped

    def map_ids(self) -> dict[str, int]:
        return {"tags": 3}

    def numbers(self) -> dict[str, Any]:
        return {"lost": 0}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return tmp_path / "history.json"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, history: Path) -> Iterator[Service]:
    monkeypatch.setattr(service_module, "Agent", FakeAgent)
    monkeypatch.setenv(VARIABLE, "off")
    made = Service(history)
    yield made
    made.close()


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "weights"
    path.write_bytes(b"w")
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def attach(service: Service, name: str) -> Any:
    answer = service.attach(name, f"{name}.bpf.o", {"max_window_mib": 8})
    assert answer == {"missing": ["filemap_get_pages"]}
    return service.agents[name]


def tag(service: Service, fd: int, policy: str, **options: Any) -> dict[str, Any]:
    return service.tag(fd, policy, "m", "/w", **{"replace": False, **options})


def test_a_policy_is_attached_once(service: Service) -> None:
    agent = attach(service, "sequential")
    with pytest.raises(PagecacheError, match="attached already"):
        service.attach("sequential", "sequential.bpf.o", {})
    assert service.agents == {"sequential": agent}
    (found,) = service.policies()["policies"]
    assert found["name"] == "sequential" and found["knobs"] == {"max_window_mib": 8}
    assert found["hooks"] and found["attached_ns"] and found["missing"] == agent.missing
    assert found["events"] == agent.events


def test_one_that_cannot_be_loaded_is_not_attached(service: Service) -> None:
    with pytest.raises(UsageError, match="is no object"):
        service.attach("sequential", "sequential.bpf.c", {})
    assert service.policies() == {"policies": [], "ended": []}


@pytest.mark.parametrize("ask", ["detach", "maps", "hints"])
def test_what_is_not_attached(service: Service, ask: str) -> None:
    with pytest.raises(UsageError, match="pin is not attached"):
        getattr(service, ask)("pin")


def test_detaching_tells_how_it_ended(service: Service, history: Path) -> None:
    agent = attach(service, "sequential")
    record = service.detach("sequential")["exit"]
    assert agent.closed and service.agents == {}
    assert (record["kind"], record["code"], record["reason"]) == ("detached", 0, "detached")
    assert service.ended() == {"exits": [record]} == {"exits": exit_history.read(history)}


def test_a_policy_that_ends_itself_is_noted_once(service: Service) -> None:
    agent = attach(service, "sequential")
    agent.exit = (-errno.EIO, "the device is gone", "access")
    service.tick()
    service.tick()
    assert service.policies() == {"policies": [], "ended": ["sequential"]}
    record = service.detach("sequential")["exit"]
    assert service.exits == [record]
    assert (record["kind"], record["code"], record["hook"], record["message"]) == (
        *("policy", -errno.EIO, "access", "the device is gone"),
    )


def test_the_history_goes_on_in_the_next_process(
    service: Service, history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_history, "EXITS_KEPT", 3)
    for _ in range(5):
        attach(service, "sequential")
        service.detach("sequential")
    assert [record["seq"] for record in service.exits] == [3, 4, 5]
    later = Service(history)
    attach(later, "maio")
    assert later.detach("maio")["exit"]["seq"] == 6


def test_ending_the_process_ends_every_policy(service: Service, history: Path) -> None:
    first, second = attach(service, "sequential"), attach(service, "maio")
    second.exit = (0, "done", "access")
    service.tick()
    service.close()
    assert first.closed and second.closed
    found = {record["policy"]: record["reason"] for record in exit_history.read(history)}
    assert found == {
        "maio": "the policy ended itself",
        "sequential": "the agent was told to end",
    }


def test_a_file_has_one_policy(service: Service, weights: int) -> None:
    sequential, maio = attach(service, "sequential"), attach(service, "maio")
    assert tag(service, weights, "sequential") == {}
    with pytest.raises(UsageError, match="tagged already"):
        tag(service, weights, "sequential")
    with pytest.raises(UsageError, match="sequential governs it"):
        tag(service, weights, "maio")
    assert not maio.tags
    tag(service, weights, "maio", replace=True, hold=True)
    assert not sequential.tags and maio.tags[key_of(weights)].hold
    (found,) = service.tags()["tags"]
    assert (found["policy"], found["model"], found["path"]) == ("maio", "m", "/w")


def test_files_are_let_go_by_what_they_are(service: Service, weights: int) -> None:
    attach(service, "sequential")
    tag(service, weights, "sequential")
    key = abi.pagecache_file_key.from_buffer_copy(key_of(weights))
    identity = (key.ino, key.dev_major, key.dev_minor, key.generation)
    assert service.untag(key.ino + 1, *identity[1:]) == {"found": False}
    assert service.untag(*identity) == {"found": True}
    assert service.untag(*identity) == {"found": False}
    tag(service, weights, "sequential")
    assert service.untag_fd(weights) == {"found": True}
    assert service.tags() == {"tags": []}


def test_our_processes_are_known_to_policies_to_come(service: Service) -> None:
    """What they read is no access; one that has ended is forgotten, as numbers come again."""
    before = attach(service, "sequential")
    ended = subprocess.Popen(["true"])
    ended.wait()
    service.ignore(ended.pid)
    service.ignore(os.getpid())
    assert before.own_processes == {ended.pid, os.getpid()}
    assert attach(service, "maio").own_processes == {os.getpid()}


def test_a_template_that_was_given_up_is_told_once(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    agent = attach(service, "maio")
    agent.dropped = ["llama"]
    service.tick()
    service.tick()
    assert caplog.text.count("the I/O template of llama was wrong too often") == 1
    service.detach("maio")
    attach(service, "maio").dropped = ["llama"]
    service.tick()
    assert caplog.text.count("wrong too often") == 2


def test_hints_are_passed_on_in_hexadecimal(service: Service) -> None:
    attach(service, "pin")
    assert service.hint_write("pin", "priorities", "0a0b", "ff") == {"found": True}
    assert service.hint_read("pin", "priorities") == {"elements": [("0a0b", "ff")]}
    assert service.hint_write("pin", "priorities", "0a0b", "") == {"found": True}
    assert service.hint_write("pin", "priorities", "0a0b", "") == {"found": False}
    assert service.maps("pin") == {"maps": {"tags": 3}} and service.hints("pin") == {"maps": []}


def test_without_an_observer_it_says_so(service: Service, weights: int) -> None:
    attach(service, "sequential")
    tag(service, weights, "sequential")
    stats = service.stats()
    assert stats["level"] == "off" and stats["missing"] == [f"{VARIABLE} is off"]
