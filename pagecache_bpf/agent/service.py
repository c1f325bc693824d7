# SPDX-License-Identifier: Apache-2.0
"""The policies of engine `agent` in one process, and what root may do with them.

Each operation is a method that is marked as one; the root socket takes them from there.  An open
file comes along with `tag`, so that whoever cannot open a file cannot have it governed.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc.operations import operation
from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.file_key import key_of
from pagecache_bpf.observer.observed_files import ObservedFiles
from pagecache_bpf.policy import exit_history
from pagecache_bpf.policy.catalog import find

_log = logging.getLogger(__name__)


class Service:
    """What the process holds: policies by name and how the last ones ended."""

    def __init__(self, history: Path | None = None) -> None:
        """Begin with what an agent before this one has left.

        Args:
            history: the file of how policies ended; None: nothing is kept beyond this process.
        """
        self.agents: dict[str, Agent] = {}
        self.attached_ns: dict[str, int] = {}
        self._history = history
        self.exits: list[dict[str, Any]] = exit_history.read(history) if history else []
        self._seq = max((record["seq"] for record in self.exits), default=0)
        self._save_history()
        self._workers: set[int] = set()
        self._dropped: set[tuple[str, str]] = set()
        self.observed = ObservedFiles()

    @operation(changes=True)
    def attach(
        self,
        policy: str,
        object: str,
        knobs: dict[str, int],
        sizes: dict[str, int] | None = None,
    ) -> dict[str, Any]:
        """Load and attach a policy."""
        info = find(policy)
        if info.name in self.agents:
            raise PagecacheError(
                f"the policy {info.name} was not attached",
                "a policy of that name is attached already",
                f"Detach it first (pagecache-bpf detach {info.name})",
            )
        agent = Agent(info, Path(object), knobs, sizes=sizes, started=self.observed.own)
        for pid in self._workers:
            agent.own(pid)
        self.agents[info.name] = agent
        self.attached_ns[info.name] = time.time_ns()
        self._save_history()
        return {"missing": agent.missing}

    @operation(changes=True)
    def detach(self, policy: str) -> dict[str, Any]:
        """End a policy; returns its exit record."""
        agent = self._agent(policy)
        self.tick()
        self.observed.forget_policy(policy)
        del self.agents[policy]
        self._dropped = {record_key for record_key in self._dropped if record_key[0] != policy}
        agent.close()
        if agent.exit is None:
            self._ended(policy, "detached", 0, "detached", "")
        self._save_history()
        return {
            "exit": next(record for record in reversed(self.exits) if record["policy"] == policy)
        }

    @operation(changes=True)
    def tag(
        self,
        fd: int,
        policy: str,
        model: str,
        path: str,
        replace: bool,
        observe: bool = True,
        hold: bool = False,
    ) -> dict[str, Any]:
        """Govern a file.  hold: keep it open, instead of opening it by its path for each read."""
        agent = self._agent(policy)
        key = key_of(fd)
        for name, other in self.agents.items():
            if key in other.tags and not replace:
                raise UsageError(
                    f"{path} was not tagged",
                    "it is tagged already" if other is agent else f"{name} governs it",
                    "Untag it first, or ask for the tag to be replaced",
                )
            other.untag(key)
        agent.tag(fd, model, path, hold)
        if observe:
            self.observed.add(key, fd, policy, model, path, "agent")
        return {}

    @operation()
    def observe(self, fd: int, policy: str, model: str, path: str) -> dict[str, Any]:
        """Observe a file that a policy of engine struct_ops governs."""
        self.observed.add(key_of(fd), fd, policy, model, path, "struct_ops")
        return {}

    @operation()
    def unobserve(self, policy: str) -> dict[str, Any]:
        """A policy of engine struct_ops has ended."""
        self.observed.forget_policy(policy)
        return {}

    @operation()
    def stats(self) -> dict[str, Any]:
        """A snapshot of the observer; pagecache_bpf.observer says what is in it."""
        return self.observed.stats()

    @operation(changes=True)
    def untag(self, ino: int, dev_major: int, dev_minor: int, generation: int) -> dict[str, Any]:
        """Let go of a file."""
        identity = {"dev_major": dev_major, "dev_minor": dev_minor, "generation": generation}
        key = bytes(abi.pagecache_file_key(ino=ino, **identity))
        self.observed.forget(key)
        return {"found": any([agent.untag(key) for agent in self.agents.values()])}

    @operation(changes=True)
    def untag_fd(self, fd: int) -> dict[str, Any]:
        """Let go of an open file."""
        key = key_of(fd)
        self.observed.forget(key)
        return {"found": any([agent.untag(key) for agent in self.agents.values()])}

    @operation()
    def maps(self, policy: str) -> dict[str, Any]:
        """Numbers of a policy's maps."""
        return {"maps": self._agent(policy).map_ids()}

    @operation()
    def tags(self) -> dict[str, Any]:
        """Every governed file."""
        return {
            "tags": [
                {**tag.as_json(), "policy": name}
                for name, agent in self.agents.items()
                for tag in list(agent.tags.values())
            ]
        }

    @operation()
    def policies(self) -> dict[str, Any]:
        """Every attached policy with its counters."""
        return {
            "policies": [
                {
                    "name": name,
                    "attached_ns": self.attached_ns[name],
                    "hooks": list(agent.info.hooks),
                    "knobs": agent.knobs,
                    "tags": len(agent.tags),
                    "missing": agent.missing,
                    **agent.numbers(),
                }
                for name, agent in self.agents.items()
                if agent.exit is None
            ],
            "ended": [name for name, agent in self.agents.items() if agent.exit is not None],
        }

    @operation()
    def hints(self, policy: str) -> dict[str, Any]:
        """The maps of a policy that are for user space, and what it counts."""
        return self._agent(policy).hints.as_json()

    @operation()
    def hint_read(self, policy: str, map: str) -> dict[str, Any]:
        """The elements of a map, in hexadecimal."""
        found = self._agent(policy).hints.elements(map)
        return {"elements": [(key.hex(), value.hex()) for key, value in found]}

    @operation()
    def hint_write(self, policy: str, map: str, key: str, value: str) -> dict[str, Any]:
        """Write an element, or remove it: an empty value."""
        hints = self._agent(policy).hints
        return {"found": hints.write(map, bytes.fromhex(key), bytes.fromhex(value))}

    @operation()
    def ended(self) -> dict[str, Any]:
        """How the last policies ended."""
        return {"exits": self.exits}

    # --- the parts ---

    def ignore(self, pid: int) -> None:
        """What this process reads, now and for policies to come, is no access."""
        self._workers = {worker for worker in self._workers if os.path.exists(f"/proc/{worker}")}
        self._workers.add(pid)
        self.observed.own(pid)
        for agent in list(self.agents.values()):
            agent.own(pid)

    def tick(self) -> None:
        """Note policies that have ended themselves, and templates that they have given up."""
        for name, agent in self.agents.items():
            for model in agent.dropped_templates():
                if (name, model) not in self._dropped:
                    self._dropped.add((name, model))
                    _log.warning(
                        "policy %s: the I/O template of %s was wrong too often: dropped",
                        name,
                        model,
                    )
            if agent.exit is not None and not agent.exit_noted:
                agent.exit_noted = True
                code, message, hook = agent.exit
                self._ended(name, "policy", code, "the policy ended itself", message, hook)

    def close(self) -> None:
        """End every policy, since the process ends."""
        for name, agent in self.agents.items():
            agent.close()
            if agent.exit is None:
                self._ended(name, "detached", 0, "the agent was told to end", "")
        self.agents.clear()
        self.observed.close()
        self._save_history()

    def _agent(self, policy: str) -> Agent:
        if policy not in self.agents:
            raise UsageError(f"the policy {policy} is not attached")
        return self.agents[policy]

    def _ended(
        self, policy: str, kind: str, code: int, reason: str, message: str, hook: str = "init"
    ) -> None:
        self._seq += 1
        self.exits.append(
            {
                "seq": self._seq,
                "time_ns": time.time_ns(),
                "policy": policy,
                "kind": kind,
                "code": code,
                "hook": hook,
                "reason": reason,
                "message": message,
            }
        )
        del self.exits[: -exit_history.EXITS_KEPT]
        self._save_history()

    def _save_history(self) -> None:
        if self._history is not None:
            live = [name for name, agent in self.agents.items() if agent.exit is None]
            exit_history.write(live, self.exits, self._history)
