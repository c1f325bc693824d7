# SPDX-License-Identifier: Apache-2.0
"""The policies of engine `agent` in one process, and what root may do with them.

Each operation is a method that is marked as one; the root socket takes them from there.  An open
file comes along with `tag`, so that whoever cannot open a file cannot have it governed.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc.operations import operation
from pagecache_bpf.kernel import abi, file_identity
from pagecache_bpf.kernel.file_key import key_of
from pagecache_bpf.kernel.process_tree import is_alive
from pagecache_bpf.observer.observed_files import ObservedFiles
from pagecache_bpf.policy import exit_history
from pagecache_bpf.policy.catalog import PolicyInfo, find

_log = logging.getLogger(__name__)


class Service:
    """The policies that the process runs, by name, and how the last ones ended.

    Attributes:
        agents: attached policies, by name.
        attached_ns: when each was attached, in nanoseconds since 1970.
        exits: how the last policies ended, the oldest first, as JSON.
        observed: the files that are observed.
    """

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
        self._prepared: tuple[Agent, str, object] | None = None  # loaded, by which names
        self.observed = ObservedFiles()

    @operation(changes=True)
    def attach(
        self,
        policy: str,
        object: str,
        knobs: dict[str, int],
        sizes: dict[str, int] | None = None,
    ) -> dict[str, Any]:
        """Load and attach a policy.

        Args:
            policy: its name, or the path of its source or object.
            object: the path of its object for engine agent.
            knobs: numbers by the knobs' names; the others have their defaults.
            sizes: elements that maps must have room for, by name.

        Returns:
            "missing": names of events that nothing tells of on this kernel.

        Raises:
            UsageError: there is no such policy, a knob does not fit, or the object is damaged.
            PagecacheError: it is attached already, or the kernel or its init refuses it.
        """
        # What was loaded before is known: to find a policy takes 20 ms.
        info = self._info_of_prepared(policy, object) or find(policy)
        if info.name in self.agents:
            raise PagecacheError(
                f"the policy {info.name} was not attached",
                "a policy of that name is attached already",
                f"Detach it first (pagecache-bpf detach {info.name})",
            )
        agent = self._take_prepared(policy, object, knobs, sizes or {})
        if agent is None:
            agent = Agent(info, Path(object), knobs, sizes=sizes, started=self.observed.own)
        for pid in self._workers:
            agent.own(pid)
        self.agents[info.name] = agent
        self.attached_ns[info.name] = time.time_ns()
        self._save_history()
        return {"missing": agent.missing}

    @operation(changes=True)
    def detach(self, policy: str) -> dict[str, Any]:
        """End a policy.

        Args:
            policy: its name.

        Returns:
            "exit": how it ended.

        Raises:
            UsageError: it is not attached.
        """
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
        """Let a policy govern a file.

        Args:
            fd: the file, which came along with the request.
            policy: the name of an attached policy.
            model: name of the model that the file belongs to.
            path: where the file is.
            replace: take it over from the policy that governs it.
            observe: count what its readers find, too.
            hold: keep it open until it is untagged, instead of opening it by its path for each
                read.

        Returns:
            Nothing, as {}.

        Raises:
            UsageError: the policy is not attached, or the file is governed already or cannot be
                opened.
        """
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
        """Observe a file that a policy of engine struct_ops governs.

        Args:
            fd: the file, which came along with the request.
            policy: the policy's name.
            model: name of the model that the file belongs to.
            path: where the file is; for people.

        Returns:
            Nothing, as {}.
        """
        self.observed.add(key_of(fd), fd, policy, model, path, "struct_ops")
        return {}

    @operation()
    def unobserve(self, policy: str) -> dict[str, Any]:
        """Observe the files of a policy of engine struct_ops no longer: it has ended.

        Args:
            policy: the policy's name.

        Returns:
            Nothing, as {}.
        """
        self.observed.forget_policy(policy)
        return {}

    @operation()
    def stats(self) -> dict[str, Any]:
        """Take a snapshot of what the observer has counted.

        Returns:
            What pagecache_bpf.observer describes.
        """
        return self.observed.stats()

    @operation(changes=True)
    def untag(self, ino: int, dev_major: int, dev_minor: int, generation: int) -> dict[str, Any]:
        """Take the tag off a file that is known by its identity only.

        Args:
            ino: the inode's number.
            dev_major: major number of the file system's device.
            dev_minor: its minor number.
            generation: the inode's generation.

        Returns:
            "found": whether a policy governed it.
        """
        identity = {"dev_major": dev_major, "dev_minor": dev_minor, "generation": generation}
        key = bytes(abi.pagecache_file_key(ino=ino, **identity))
        self.observed.forget(key)
        return {"found": any([agent.untag(key) for agent in self.agents.values()])}

    @operation(changes=True)
    def untag_fd(self, fd: int) -> dict[str, Any]:
        """Take the tag off an open file.

        Args:
            fd: the file, which came along with the request.

        Returns:
            "found": whether a policy governed it.
        """
        key = key_of(fd)
        self.observed.forget(key)
        return {"found": any([agent.untag(key) for agent in self.agents.values()])}

    @operation()
    def maps(self, policy: str) -> dict[str, Any]:
        """List the maps of a policy.

        Args:
            policy: its name.

        Returns:
            "maps": the kernel's numbers of its maps, by their names.

        Raises:
            UsageError: it is not attached.
        """
        return {"maps": self._agent(policy).map_ids()}

    @operation()
    def tags(self) -> dict[str, Any]:
        """List the governed files.

        Returns:
            "tags": for each file its identity, model, path, policy and pages in the page cache.
        """
        return {
            "tags": [
                {**tag.as_json(), "policy": name}
                for name, agent in self.agents.items()
                for tag in list(agent.tags.values())
            ]
        }

    @operation()
    def policies(self) -> dict[str, Any]:
        """List the attached policies.

        Returns:
            "policies": for each its name, hooks, knobs, counters and what Agent.numbers() tells;
            "ended": names of those that have ended themselves and were not detached yet.
        """
        return {
            "policies": [
                {
                    "name": name,
                    "attached_ns": self.attached_ns[name],
                    "hooks": list(agent.info.hooks),
                    "knobs": agent.knobs,
                    "tags": len(agent.tags),
                    "missing": agent.missing,
                    "events": agent.events,
                    **agent.numbers(),
                }
                for name, agent in self.agents.items()
                if agent.exit is None
            ],
            "ended": [name for name, agent in self.agents.items() if agent.exit is not None],
        }

    @operation()
    def hints(self, policy: str) -> dict[str, Any]:
        """Describe the maps of a policy that are for user space, and its gauges.

        Args:
            policy: its name.

        Returns:
            What Hints.as_json() returns.

        Raises:
            UsageError: it is not attached.
        """
        return self._agent(policy).hints.as_json()

    @operation()
    def hint_read(self, policy: str, map: str) -> dict[str, Any]:
        """Read the elements of a policy's map for user space.

        Args:
            policy: its name.
            map: the map's name.

        Returns:
            "elements": keys and values, in hexadecimal.

        Raises:
            UsageError: the policy is not attached, or has no such map.
        """
        found = self._agent(policy).hints.elements(map)
        return {"elements": [(key.hex(), value.hex()) for key, value in found]}

    @operation()
    def hint_write(self, policy: str, map: str, key: str, value: str) -> dict[str, Any]:
        """Write or remove an element of a policy's map for user space.

        Args:
            policy: its name.
            map: the map's name.
            key: the key, in hexadecimal.
            value: the value, in hexadecimal; empty: remove the element.

        Returns:
            "found": False if it was to be removed and was not there.

        Raises:
            UsageError: the policy is not attached, has no such map, or sizes do not fit.
        """
        hints = self._agent(policy).hints
        return {"found": hints.write(map, bytes.fromhex(key), bytes.fromhex(value))}

    @operation()
    def ended(self) -> dict[str, Any]:
        """Tell how the last policies ended.

        Returns:
            "exits": records, the oldest first.
        """
        return {"exits": self.exits}

    # --- the parts ---

    def prepare(self, policy: str, object: str, knobs: dict[str, int]) -> None:
        """Load a policy that is attached soon, and the observer; attach() then takes no time.

        Args:
            policy: its name, or the path of its source or object.
            object: its object for engine agent.
            knobs: values by name; one that is attached with others is loaded anew.

        Raises:
            PagecacheError: as attaching does.
        """
        with suppress(PagecacheError):  # what takes it is refused then, and says why
            file_identity.prepare()
        self.observed.prepare()
        agent = Agent(find(policy), Path(object), knobs, started=self.observed.own, begin=False)
        self._drop_prepared()
        self._prepared = agent, policy, _version(object)

    def _info_of_prepared(self, policy: str, object: str) -> PolicyInfo | None:
        """Return what is known of the policy that was loaded ahead; None: it is another one."""
        if self._prepared is None or self._prepared[1:] != (policy, _version(object)):
            return None
        return self._prepared[0].info

    def _take_prepared(
        self, policy: str, object: str, knobs: dict[str, int], sizes: dict[str, int]
    ) -> Agent | None:
        """Have a policy that was loaded before work; None: there is none, or not for this."""
        if self._prepared is None or self._info_of_prepared(policy, object) is None:
            return None
        agent = self._prepared[0]
        if not agent.fits(knobs, sizes):
            return None
        self._prepared = None
        try:
            agent.begin()
        except BaseException:
            agent.close()
            raise
        return agent

    def _drop_prepared(self) -> None:
        before, self._prepared = self._prepared, None
        if before is not None:
            before[0].close()

    def ignore(self, pid: int) -> None:
        """Have policies ignore what a process reads, those that are attached later too: it is ours.

        Args:
            pid: the process.
        """
        self._workers = {worker for worker in self._workers if is_alive(worker)}
        self._workers.add(pid)
        self.observed.own(pid)
        for agent in list(self.agents.values()):
            agent.own(pid)

    def tick(self) -> None:
        """Take note of policies that have ended themselves, and of templates that they gave up.

        To be called now and then by whoever runs the process.
        """
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
        """End every policy, as the process is about to end."""
        for name, agent in self.agents.items():
            agent.close()
            if agent.exit is None:
                self._ended(name, "detached", 0, "the agent was told to end", "")
        self.agents.clear()
        self._drop_prepared()
        self.observed.close()
        self._save_history()

    def _agent(self, policy: str) -> Agent:
        """Return an attached policy.  Raises UsageError."""
        if policy not in self.agents:
            raise UsageError(f"the policy {policy} is not attached")
        return self.agents[policy]

    def _ended(
        self, policy: str, kind: str, code: int, reason: str, message: str, hook: str = "init"
    ) -> None:
        """Add a record of how a policy ended."""
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
        """Write down what is attached and how the last policies ended, if a history is kept."""
        if self._history is not None:
            live = [name for name, agent in self.agents.items() if agent.exit is None]
            exit_history.write(live, self.exits, self._history)


def _version(object: str) -> tuple[str, int, int]:
    """Identify a build of an object file: path, time and inode number; -1 for one that is gone."""
    try:
        status = os.stat(object)
    except OSError:
        return object, -1, -1
    return object, status.st_mtime_ns, status.st_ino
