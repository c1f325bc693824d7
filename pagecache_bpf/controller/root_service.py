# SPDX-License-Identifier: Apache-2.0
"""The operations of the root socket, which only root may call.

These are the agent's (agent.service), and what only root may ask of the controller.  Both sides
are of one installation, and speak as on the public socket.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from pagecache_bpf.agent.service import Service
from pagecache_bpf.controller.admission import MODEL_CLAIM, Claim, refusal
from pagecache_bpf.controller.leases import Leases
from pagecache_bpf.controller.load_ledger import ClientLoad, LoadLedger, headroom
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.ipc import wire
from pagecache_bpf.ipc.operations import collect, operation
from pagecache_bpf.ipc.server import Connection, close_all

#: Root's requests take turns in a thread of their own: policies are not attached side by side.
QUEUE = "root"


class RootService:
    """Handler of the root socket."""

    line_bytes = 64 << 20  # `admit` names every file of a model: 100,000 take 7 MB
    fds_per_message = wire.BATCH_REQUESTS
    connections_per_user = 64  # of users who are not root, whom it refuses anyhow
    connections = None
    idle_seconds = None

    def __init__(
        self,
        service: Service,
        lock: threading.RLock,
        ledger: LoadLedger,
        *,
        facts: Callable[[], dict[str, Any]],
        clients: Callable[[], list[dict[str, Any]]],
        health: Callable[[], dict[str, Any]],
        kick: Callable[[int], bool],
        reload: Callable[[], dict[str, Any]],
        changed: Callable[[], None],
    ) -> None:
        """Take requests to the agent's service and to the controller.

        Args:
            service: the agent's policies.
            lock: held around every operation of the service.
            ledger: the open loads.
            facts: what `controller` answers first.
            clients: lists the connections.
            health: tells how much there is to do, and what was refused.
            kick: hangs up on one by its number; False: there is none.
            reload: reads the configuration again.
            changed: called after an operation that changes what the state file has to know.
        """
        self.asked = 0.0  # when the last request came, in monotonic seconds
        self._lock, self._ledger, self._service = lock, ledger, service
        self._list_clients, self._numbers, self._hang_up = clients, health, kick
        self._facts, self._read_again, self._changed = facts, reload, changed
        self._leases = Leases(service)
        self._pending: dict[Connection, list[Claim]] = {}  # a claim comes before its tags
        self._of_agent = collect(service)
        self._of_controller = collect(self)

    def queue(self, connection: Connection) -> object:
        """Return the key of the queue for a connection's work: root's is reserved.

        Args:
            connection: the client's connection.

        Returns:
            The key.
        """
        return QUEUE if connection.privileged else connection.owner

    def may_end(self, connection: Connection) -> bool:
        """Return whether nothing is leased by a connection; see leases.Leases.

        Args:
            connection: a connection that has been idle.

        Returns:
            Whether it loses nothing by being closed.
        """
        return not self._leases.has(connection)

    def gone(self, connection: Connection) -> None:
        """Take back what was leased by a connection that has ended, and claims without tags.

        Args:
            connection: the connection that was closed.
        """
        with self._lock:
            changed = self._leases.end(connection)
        for claim in self._pending.pop(connection, ()):
            claim.pending = False
        self._ledger.release_untagged()
        if changed:
            self._changed()

    def request(self, connection: Connection, line: bytes, fds: list[int]) -> bytes | None:
        """Answer one request.

        Args:
            connection: who asks.
            line: the request.
            fds: an open file for each request that takes one; they are closed here.

        Returns:
            The answer; None: none is due.

        Raises:
            PagecacheError: it was refused, or failed.
            PrivilegeError: it is not root that asks.
        """
        self.asked = time.monotonic()
        try:
            if not connection.privileged:
                raise PrivilegeError(
                    "only root can talk to the agent",
                    f"this is user {connection.uid}"
                    + ("" if connection.uid else " of a container (another user or PID namespace)"),
                )
            return wire.encode_answer(self._call(connection, line, fds))
        except (OSError, ValueError) as error:
            raise PagecacheError("the agent failed", str(error)) from error
        finally:
            close_all(fds)

    def _call(self, connection: Connection, line: bytes, fds: list[int]) -> dict[str, Any]:
        name, arguments = wire.decode_request(line)
        if name == "batch":
            return {"answers": self._batch(connection, arguments.get("requests"), fds)}
        if len(fds) > 1:
            raise wire.refused("too many descriptors came along")
        return self._one(connection, name, arguments, fds[0] if fds else None)

    def _batch(self, connection: Connection, requests: Any, fds: list[int]) -> list[dict[str, Any]]:
        """Answer requests one after the other, up to the first that fails.

        A command that tags 10,000 files would wait 10,000 times otherwise.
        """
        if not isinstance(requests, list) or not all(
            isinstance(request, dict) for request in requests
        ):
            raise wire.refused("requests of batch has a bad value", wire.shortened(requests))
        left = iter(fds)
        answers: list[dict[str, Any]] = []
        for arguments in requests:
            name = str(arguments.pop("op", ""))
            asked = self._of_agent.get(name)
            fd = next(left, None) if asked is not None and asked.takes_file else None
            try:
                answers.append({"ok": self._one(connection, name, arguments, fd)})
            except PagecacheError as error:
                answers.append({"error": wire.error_fields(error)})
                break
        return answers

    def _one(
        self, connection: Connection, name: str, arguments: dict[str, Any], fd: int | None
    ) -> dict[str, Any]:
        """Answer one request."""
        lease = name in Leases.OPERATIONS and arguments.pop("lease", False) is True
        if fd is None and "fd" in arguments:
            raise wire.refused(f"{name} takes an open file, not its number")
        if fd is not None:
            arguments["fd"] = fd
        own = self._of_controller.get(name)
        if own is not None:
            told = dict(own(arguments))
            if name == "admit":
                self._await_tags(connection, arguments["model"])
            return told
        asked = self._of_agent.get(name)
        if asked is None:
            raise wire.refused("there is no such operation", wire.shortened(name))
        with self._lock:
            answer = asked(arguments)
            if lease:
                self._leases.take(connection, name, arguments)
        if asked.changes:
            self._changed()
        return dict(answer)

    def _await_tags(self, connection: Connection, model: str) -> None:
        """Keep the claim on a model while the connection lasts that is to set its tags."""
        claim = self._ledger.budgets.claims.get(f"{MODEL_CLAIM}{model}")
        if claim is not None:
            self._pending.setdefault(connection, []).append(claim)
            if not connection.alive:  # gone() may have been before
                self._pending.pop(connection, None)
                claim.pending = False

    # --- operations ---

    @operation()
    def controller(self) -> dict[str, Any]:
        """Tell who is there, and who holds what.

        Returns:
            What `status` shows of the controller.
        """
        self._ledger.release_untagged()
        budgets = self._ledger.budgets
        charges = budgets.charges()
        return {
            **self._facts(),
            "budget": {"total_bytes": budgets.total, "claimed_bytes": sum(charges.values())},
            "claims": [
                {
                    "id": name,
                    "model": claim.model,
                    "uid": claim.uid,
                    "pid": _pid_of(self._ledger.loads.get(name)),
                    "wanted_bytes": claim.size,
                    "granted_bytes": claim.granted,
                    "charged_bytes": charges.get(name, 0),
                }
                for name, claim in list(budgets.claims.items())
            ],
        }

    @operation()
    def clients(self) -> dict[str, Any]:
        """List who is connected, and tell how the controller does.

        Returns:
            `clients` and `health`.
        """
        return {"clients": self._list_clients(), "health": self._numbers()}

    @operation()
    def kick(self, client: int) -> dict[str, Any]:
        """Hang up on a client by its number.

        Args:
            client: the number of its connection.

        Returns:
            `found`: whether there was one.
        """
        return {"found": self._hang_up(client)}

    @operation()
    def reload(self) -> dict[str, Any]:
        """Read the configuration again.

        Returns:
            As Daemon.reload().

        Raises:
            UsageError: it is wrong, or no `serve` runs.
        """
        return self._read_again()

    @operation()
    def admit(self, model: str, files: dict[str, int], budget: int | None = None) -> dict[str, Any]:
        """Judge what `attach` and `tag` bring.

        Args:
            model: its name.
            files: sizes in bytes by the key of the file, in hexadecimal.
            budget: its own bound in bytes; None: it has none.

        Returns:
            What was decided.

        Raises:
            PagecacheError: it does not fit.
        """
        self._ledger.release_untagged()
        budgets = self._ledger.budgets
        sizes = {bytes.fromhex(name): size for name, size in files.items()}
        decision = budgets.decide_for_root(model, sizes, budget, headroom(os.getpid()))
        if decision.kind in ("queue", "refuse"):  # a command does not wait
            raise refusal(model, decision)
        budgets.claim(
            f"{MODEL_CLAIM}{model}", Claim(model, 0, sizes, decision.granted, pending=True)
        )
        return decision.as_json()

    @operation()
    def release(self, model: str) -> dict[str, Any]:
        """Take back what `admit` has noted.

        Args:
            model: the name of the model.

        Returns:
            Nothing.
        """
        self._ledger.budgets.release(f"{MODEL_CLAIM}{model}")
        return {}


def _pid_of(load: ClientLoad | None) -> int | None:
    """Return the process of a load; None: it is over, or the claim was made for no load."""
    return None if load is None else load.peer.pid
