# SPDX-License-Identifier: Apache-2.0
"""The root socket: the agent's operations (agent/service.py), and what only root may ask of the
controller.  One line of JSON each way, without a version: both sides are of one installation.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pagecache_bpf.agent import service
from pagecache_bpf.agent.service import Service
from pagecache_bpf.controller.admission import Claim, refusal
from pagecache_bpf.controller.load_ledger import LoadLedger, headroom
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.ipc.server import Connection, close_all
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.kernel.kmod import is_loaded

QUEUE = "root"
#: Operations after which the state on disk is stale.
_CHANGES = ("attach", "detach", "tag", "untag", "untag_fd")
_UNTAGGED_SECONDS = 60.0  # a claim comes before its tags
_OWN = ("controller", "admit", "release", "reload")


class RootService:
    """Handler of the root socket.  facts: what `controller` answers; reload: reads the
    configuration again; changed: called after what the state file has to know.
    """

    line_bytes = 64 << 20  # `admit` names every file of a model: 100,000 take 7 MB
    fds_per_message = 1

    def __init__(
        self,
        own: Service,
        lock: threading.RLock,
        ledger: LoadLedger,
        facts: Callable[[], dict[str, Any]],
        reload: Callable[[], dict[str, Any]],
        changed: Callable[[], None],
    ) -> None:
        self.asked = 0.0  # when the last request came, in monotonic seconds
        self._service, self._lock, self._ledger = own, lock, ledger
        self._facts, self._read_again, self._changed = facts, reload, changed

    def queue(self, connection: Connection) -> object:
        """Root's requests take turns: policies are not attached side by side."""
        return QUEUE if connection.uid == 0 else connection.uid

    def gone(self, connection: Connection) -> None:
        """Nothing of root's ends with a connection."""

    def request(self, connection: Connection, line: bytes, fds: list[int]) -> bytes | None:
        """Answer one request."""
        self.asked = time.monotonic()
        try:
            if connection.uid != 0:
                raise PrivilegeError(
                    "only root can talk to the agent", f"this is user {connection.uid}"
                )
            reply = self._call(line, fds)
        except PagecacheError as error:
            fields = {"what": error.what, "why": error.why, "fix": error.fix, "docs": error.docs}
            reply = {"error": {**fields, "class": type(error).__name__}}
        except OSError as error:
            reply = {"error": {"what": "the agent failed", "why": str(error)}}
        finally:
            close_all(fds)
        return json.dumps(reply).encode() + b"\n"

    def _call(self, line: bytes, fds: list[int]) -> dict[str, Any]:
        try:
            request = json.loads(line)
            operation = request.pop("op")
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise UsageError("the agent does not understand the request", str(error)) from None
        if fds:
            request["fd"] = fds[0]
        try:
            if operation in _OWN:
                return dict(getattr(self, f"_{operation}")(**request))
            if operation not in service.OPERATIONS:
                raise UsageError(f"the agent has no operation {operation}")
            with self._lock:
                reply: dict[str, Any] = getattr(self._service, operation)(**request)
        except (TypeError, ValueError) as error:
            raise UsageError("the agent does not understand the request", str(error)) from error
        if operation in _CHANGES:
            self._changed()
        return reply

    def _controller(self) -> dict[str, Any]:
        """Who is there, and who holds what."""
        self.sweep()
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
                    "pid": self._ledger.loads[name].pid if name in self._ledger.loads else None,
                    "wanted_bytes": claim.size,
                    "granted_bytes": claim.granted,
                    "charged_bytes": charges[name],
                }
                for name, claim in list(budgets.claims.items())
            ],
        }

    def _reload(self) -> dict[str, Any]:
        """Read the configuration again."""
        return self._read_again()

    def _admit(
        self, model: str, files: dict[str, int], budget: int | None = None
    ) -> dict[str, Any]:
        """Judge what `attach` and `tag` bring: files by their keys in hex, with their sizes.

        Raises PagecacheError when it does not fit.
        """
        self.sweep()
        budgets = self._ledger.budgets
        sizes = {bytes.fromhex(name): size for name, size in files.items()}
        decision = budgets.decide_for_root(model, sizes, budget, headroom(os.getpid()))
        if decision.kind in ("queue", "refuse"):  # a command does not wait
            raise refusal(model, decision)
        budgets.claim(f"model:{model}", Claim(model, 0, sizes, decision.granted))
        return decision.as_json()

    def _release(self, model: str) -> dict[str, Any]:
        """Take back what `admit` has noted."""
        self._ledger.budgets.release(f"model:{model}")
        return {}

    def sweep(self) -> None:
        """Forget the claims of models that have no tag left."""
        names = {
            tag.model for agent in self._service.agents.values() for tag in agent.tags.values()
        }
        if is_loaded():
            with suppress(PagecacheError), Device() as device:
                names.update(tag.model for tag in device.tags())
        for name, claim in list(self._ledger.budgets.claims.items()):
            if not name.startswith("model:"):
                continue
            if claim.model in names:
                claim.tagged = True
            elif claim.tagged or time.monotonic() > claim.since + _UNTAGGED_SECONDS:
                self._ledger.budgets.release(name)
