# SPDX-License-Identifier: Apache-2.0
"""Both engines behind one front, with something else in place of the kernel and of the agent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel import kmod
from pagecache_bpf.kernel.control_device import ExitRecord
from pagecache_bpf.policy import agent_device, engines, exit_history, loader


class Policy:
    """As a device lists it."""

    def __init__(self, name: str) -> None:
        self.name = name


class Kernel:
    """The module's or the agent's side: policies, tags by descriptor, and what was asked of it."""

    def __init__(self, *policies: str) -> None:
        self.names = list(policies)
        self.tagged: set[int] = set()
        self.asked: list[str] = []

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.asked.append("closed")

    def policies(self) -> Iterator[Policy]:
        return map(Policy, self.names)

    def details(self) -> dict[str, Any]:
        return {name: {} for name in self.names}

    def exits(self) -> list[ExitRecord]:
        return []

    def untag_fd(self, fd: int) -> None:
        if fd not in self.tagged:
            raise UsageError(f"{fd} is not tagged here")
        self.tagged.remove(fd)

    def detach(self, name: str) -> str:
        self.names.remove(name)
        return f"{name} ended"

    def unobserve(self, policy: str) -> None:
        self.asked.append(f"unobserve {policy}")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel("sequential")
    monkeypatch.setattr(kmod, "is_loaded", lambda: True)
    monkeypatch.setattr(engines, "Device", lambda: found)
    monkeypatch.setattr(loader, "pinned", lambda: found.names)
    monkeypatch.setattr(loader, "detach", found.detach)
    return found


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel("maio")
    monkeypatch.setattr(agent_device, "connect", lambda: found)
    return found


@pytest.fixture
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_device, "connect", lambda: None)


def test_policies_are_those_of_both(module: Kernel, agent: Kernel) -> None:
    with engines.Engines() as found:
        assert [(name, policy.name) for name, policy in found.policies()] == [
            ("struct_ops", "sequential"),
            ("agent", "maio"),
        ]
        assert found.attached() == ["sequential", "maio"]
        assert found.engine_of("maio") == "agent"
        assert found.engine_of("sequential") == "struct_ops"
        assert found.engine_of("fifo") is None
    assert module.asked == agent.asked == ["closed"]


def test_without_an_agent_there_is_the_module_alone(module: Kernel, no_agent: None) -> None:
    with engines.Engines() as found:
        assert found.agent is None and found.attached() == ["sequential"]


def test_a_lease_is_used_and_left_open(
    module: Kernel, monkeypatch: pytest.MonkeyPatch, agent: Kernel
) -> None:
    lease: Any = Kernel("cyclic")
    with engines.Engines(lease=lease) as found:
        assert found.attached() == ["sequential", "cyclic"]
    assert lease.asked == [] and agent.asked == []


def test_a_policy_is_detached_where_it_is(module: Kernel, agent: Kernel) -> None:
    with engines.Engines() as found:
        ended: Any = found.detach("maio")
        assert ended == "maio ended" and agent.asked == []
        ended = found.detach("sequential")
        assert ended == "sequential ended"
    # What the agent's process has observed for the module's policy goes with it.
    assert agent.asked == ["unobserve sequential", "closed"]


def test_untagging_succeeds_where_one_of_them_has_the_tag(module: Kernel, agent: Kernel) -> None:
    with engines.Engines() as found:
        for device in (module, agent):
            device.tagged.add(7)
            found.untag_fd(7)
            assert not device.tagged
        module.tagged, agent.tagged = {7}, {7}
        found.untag_fd(7)
        assert not module.tagged | agent.tagged
        with pytest.raises(UsageError, match="7 is not tagged here"):
            found.untag_fd(7)


def test_untagging_without_engines_says_so(monkeypatch: pytest.MonkeyPatch, no_agent: None) -> None:
    monkeypatch.setattr(kmod, "is_loaded", lambda: False)
    with engines.Engines() as found, pytest.raises(PagecacheError, match="not tagged"):
        found.untag_fd(7)


@pytest.mark.parametrize("running", [False, True])
def test_the_history_is_read_where_no_agent_tells_it(
    module: Kernel, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    kept = {"seq": 1, "time_ns": 2, "policy": "maio", "kind": "killed", "code": -9}
    kept |= {"hook": "init", "reason": "", "message": ""}
    monkeypatch.setattr(exit_history, "read", lambda: [kept])
    monkeypatch.setattr(agent_device, "connect", lambda: Kernel() if running else None)
    with engines.Engines() as found:
        assert [record.policy for record in found.exits()] == ([] if running else ["maio"])
