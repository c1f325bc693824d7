# SPDX-License-Identifier: Apache-2.0
"""Random conversations of several users with the public socket, beside a model of who may see what.

The server, its sockets and its descriptors are real; the kernel's side is the fake of
test_controller_loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.ipc import peer as peers
from pagecache_bpf.ipc.public_client import PublicClient
from tests.unit.test_controller_inspectors import weights
from tests.unit.test_controller_loads import Given, Running, given, running
from tests.vm.kernel import wait_for

__all__ = ["given", "running"]  # fixtures
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a process of another user takes root")

FILES = 3
USERS = (0, 1001, 1002)


@dataclass(eq=False)
class Client:
    """A connection, and what it should have."""

    uid: int
    connection: PublicClient
    number: int  # the server's
    waiting: list[int] = field(default_factory=list)
    alive: bool = True


@dataclass(eq=False)
class Opened:
    """A load, and whose it is."""

    client: Client
    id: str
    model: str
    files: frozenset[int]
    open: bool = True


def machine(server: Running, fds: list[int], patch: pytest.MonkeyPatch) -> Any:
    """Make the class of the machine for a server."""
    keys: dict[int, bytes] = {}

    class Conversation(RuleBasedStateMachine):
        clients = Bundle("clients")
        loads = Bundle("loads")

        def __init__(self) -> None:
            super().__init__()
            self.everybody: list[Client] = []
            self.opened: list[Opened] = []

        def open_loads(self) -> list[Opened]:
            return [load for load in self.opened if load.open]

        @rule(target=clients, uid=st.sampled_from(USERS))
        def connect(self, uid: int) -> Client:
            patch.setattr(peers, "credentials", lambda sock: (os.getpid(), uid, uid))
            connection = server.client()
            assert connection.hello()["protocol"] == 1  # it was taken as that user
            client = Client(uid, connection, server.server.accepted)
            self.everybody.append(client)
            return client

        @rule(client=clients, files=st.lists(st.integers(0, FILES - 1), min_size=1, max_size=5))
        def pass_files(self, client: Client, files: list[int]) -> None:
            if client.alive:
                told = client.connection.request("files", [fds[number] for number in files])
                client.waiting += files
                assert told["files"] == len(client.waiting)

        @rule(target=loads, client=clients, model=st.sampled_from(["m", "n"]))
        def open_load(self, client: Client, model: str) -> Any:
            if not client.alive:
                return multiple()
            if not client.waiting:
                with pytest.raises(UsageError, match="no files were passed"):
                    client.connection.request("open_load", model=model, policy="sequential")
                return multiple()
            report = client.connection.request("open_load", model=model, policy="sequential")
            files, client.waiting = frozenset(client.waiting), []
            name = model if client.uid == 0 else f"{model}@{client.uid}"
            assert (report["model"], report["files"]) == (name, len(files))
            assert (report["policy"], report["state"]) == ("sequential", "open")
            load = Opened(client, report["load"], name, files)
            self.opened.append(load)
            return load

        @rule(client=clients, load=loads, how=st.sampled_from(["load_report", "done", "close"]))
        def ask_of_a_load(self, client: Client, load: Opened, how: str) -> None:
            if not client.alive:
                return
            if load.client is not client or not load.open:
                with pytest.raises(PrivilegeError, match="there is no such load"):
                    client.connection.request(how, load=load.id)
                return
            report = client.connection.request(how, load=load.id)
            assert report["model"] == load.model
            load.open = how == "load_report"
            assert report["state"] == ("open" if load.open else "done")

        @rule(client=clients)
        def status(self, client: Client) -> None:
            if client.alive:
                seen = {load["load"] for load in client.connection.status()["loads"]}
                mine = {load.id for load in self.open_loads() if client.uid in (0, load.client.uid)}
                assert seen == mine

        @rule(client=clients, number=st.integers(0, FILES - 1))
        def ask_of_a_file(self, client: Client, number: int) -> None:
            if client.alive:
                readers = [load for load in self.open_loads() if number in load.files]
                governed = client.connection.residency(fds[number])["governed"]
                assert governed == bool(readers)
                in_use = client.connection.drop(fds[number])["in_use"]
                assert in_use == any(load.client is not client for load in readers)

        @rule(client=clients, line=st.binary(max_size=60).filter(lambda data: b"\n" not in data))
        def nonsense(self, client: Client, line: bytes) -> None:
            """It is refused and costs nothing that the connection has."""
            if client.alive:
                client.connection._socket.sendall(line + b"\n")
                assert b'"error"' in client.connection._line(60)

        @rule(client=consumes(clients), kicked=st.booleans())
        def hang_up(self, client: Client, kicked: bool) -> None:
            if not client.alive:
                return
            client.alive = False
            if kicked:
                for found in list(server.server.connections):
                    if found.number == client.number:
                        server.server.call(found.close)
                with pytest.raises(PagecacheError):
                    while True:
                        client.connection.hello()
            client.connection.disconnect()
            for load in self.opened:
                load.open = load.open and load.client is not client
            wait_for(
                lambda: set(server.ledger.loads) == {load.id for load in self.open_loads()},
                "its loads to end with it",
                60,
            )

        @invariant()
        def only_what_is_open_is_kept(self) -> None:
            assert set(server.ledger.loads) == {load.id for load in self.open_loads()}
            read = {number for load in self.open_loads() for number in load.files}
            assert set(server.kernel.tags) == {keys[number] for number in read}
            names = {model for _, model in server.kernel.tags.values()}
            assert names <= {load.model for load in self.open_loads()}

        def teardown(self) -> None:
            for client in self.everybody:
                client.connection.disconnect()
            wait_for(lambda: not server.public._sessions, "every session to end", 60)
            assert server.server.cleanups.wait_idle(60)  # a session's loads end after it
            assert not server.ledger.loads and not server.kernel.tags
            assert not server.public._pending and not server.ledger.budgets.claims

    from pagecache_bpf.kernel.file_key import key_of

    keys.update({number: key_of(fd) for number, fd in enumerate(fds)})
    return Conversation


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[list[int]]:
    opened = [weights(tmp_path / f"{number}.safetensors", number + 1) for number in range(FILES)]
    yield opened
    for fd in opened:
        os.close(fd)


def test_nobody_sees_or_ends_what_is_anothers(
    running: Running,
    given: Given,
    fds: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_state_machine_as_test(
        machine(running, fds, monkeypatch),
        settings=settings(
            max_examples=8,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
