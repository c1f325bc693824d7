# SPDX-License-Identifier: Apache-2.0
"""What ends with a connection of root's, and what does not; the agents are the kernel's side."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from pagecache_bpf.controller import leases
from pagecache_bpf.controller.leases import Leases


class FakeService:
    """Policies and their tags, as agent.service.Service keeps them."""

    def __init__(self) -> None:
        self.agents: dict[str, Any] = {}
        self.observed = SimpleNamespace(forget=lambda key: None)

    def attach(self, name: str) -> None:
        tags: dict[bytes, object] = {}
        self.agents[name] = SimpleNamespace(tags=tags, untag=lambda key: tags.pop(key, None))

    def detach(self, name: str) -> None:
        del self.agents[name]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    monkeypatch.setattr(leases, "key_of", lambda fd: str(fd).encode())
    return FakeService()


def tag(service: FakeService, held: Leases, connection: object | None, fd: int) -> None:
    service.agents["sequential"].tags[str(fd).encode()] = object()
    if connection is not None:
        held.take(connection, "tag", {"fd": fd, "policy": "sequential"})


def test_a_policy_goes_with_its_last_lease(service: FakeService) -> None:
    held: Leases = Leases(service)  # type: ignore[arg-type]
    service.attach("sequential")
    held.take("first", "attach", {})
    tag(service, held, "first", 1)
    tag(service, held, "second", 2)
    assert held.has("first") and held.end("first") and not held.has("first")
    assert list(service.agents["sequential"].tags) == [b"2"]
    assert held.end("second") and not service.agents
    assert not held.end("second")


def test_what_commands_have_done_stays(service: FakeService) -> None:
    held: Leases = Leases(service)  # type: ignore[arg-type]
    service.attach("sequential")
    tag(service, held, "a load", 1)  # beside a policy that a command has attached
    held.end("a load")
    assert not service.agents["sequential"].tags
    service.detach("sequential")
    service.attach("sequential")
    held.take("a load", "attach", {})
    tag(service, held, None, 3)  # by a command, meanwhile
    held.end("a load")
    assert list(service.agents["sequential"].tags) == [b"3"]


def test_a_policy_of_the_same_name_that_was_attached_since_stays(service: FakeService) -> None:
    held: Leases = Leases(service)  # type: ignore[arg-type]
    service.attach("sequential")
    held.take("a load", "attach", {})
    service.detach("sequential")
    service.attach("sequential")
    held.end("a load")
    assert "sequential" in service.agents


def test_one_that_is_attached_while_another_ends_stays(service: FakeService) -> None:
    held: Leases = Leases(service)  # type: ignore[arg-type]
    service.attach("sequential")
    held.take("starting", "attach", {})
    tag(service, held, "other", os.getpid())
    held.end("other")
    assert "sequential" in service.agents
