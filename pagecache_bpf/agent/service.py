# SPDX-License-Identifier: Apache-2.0
"""The agent's process: runs policies and answers the command line on a Unix socket.

It starts with the first policy of engine `agent` and ends with the last one.  Root only.  One
request is one line of JSON, the answer another; an open file comes along with `tag`, so that
whoever cannot open a file cannot have it governed.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pagecache_bpf._logs import RUN_DIR
from pagecache_bpf.agent.engine import Agent, key_of
from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.observer import Observer
from pagecache_bpf.policies import find

SOCKET = RUN_DIR / "agent.sock"
LOCK = RUN_DIR / "agent.lock"
EXITS_KEPT = 64
_TICK_SECONDS = 0.2
_IDLE_SECONDS = 5.0
_LINE_BYTES = 64 << 10


class Service:
    """What the process holds: policies by name and how the last ones ended."""

    def __init__(self) -> None:
        self.agents: dict[str, Agent] = {}
        self.attached_ns: dict[str, int] = {}
        self.exits: list[dict[str, Any]] = []
        self._seq = 0
        self._observer: Observer | None = None
        self._blind = ""  # why there is no observer
        self._own: set[int] = set()  # this process, and the agents' workers

    def close(self) -> None:
        """End every policy, and the observer."""
        for agent in self.agents.values():
            agent.close()
        if self._observer:
            self._observer.close()

    # Each request is a method; its arguments are the members of the request.

    def attach(
        self, policy: str, object: str, knobs: dict[str, int], sizes: dict[str, int]
    ) -> dict[str, Any]:
        """Load and attach a policy."""
        info = find(policy)
        if info.name in self.agents:
            raise PagecacheError(
                f"the policy {info.name} was not attached",
                "a policy of that name is attached already",
                f"Detach it first (pagecache-bpf detach {info.name})",
            )
        agent = Agent(info, Path(object), knobs, sizes=sizes, started=self._started)
        self.agents[info.name] = agent
        self.attached_ns[info.name] = time.time_ns()
        return {"missing": agent.missing}

    def detach(self, policy: str) -> dict[str, Any]:
        """End a policy; returns its exit record."""
        agent = self._agent(policy)
        del self.agents[policy]
        for key in list(agent.tags):
            self._forget(key)
        agent.close()
        if agent.exit is None:
            self._ended(policy, "detached", 0, "detached", "")
        return {"exit": next(each for each in reversed(self.exits) if each["policy"] == policy)}

    def tag(self, fd: int, policy: str, model: str, path: str, replace: bool) -> dict[str, Any]:
        """Govern a file."""
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
        agent.tag(fd, model, path)
        self._observe(fd, policy, model, path)
        return {}

    def untag(self, ino: int, dev_major: int, dev_minor: int, generation: int) -> dict[str, Any]:
        """Let go of a file."""
        for agent in self.agents.values():
            for key, tag in list(agent.tags.items()):
                if (tag.ino, tag.dev_major, tag.dev_minor, tag.generation) == (
                    *(ino, dev_major, dev_minor, generation),
                ):
                    self._forget(key)
                    return {"found": agent.untag(key)}
        return {"found": False}

    def untag_fd(self, fd: int) -> dict[str, Any]:
        """Let go of an open file."""
        key = key_of(fd)
        self._forget(key)
        return {"found": any([agent.untag(key) for agent in self.agents.values()])}

    def maps(self, policy: str) -> dict[str, Any]:
        """Numbers of a policy's maps."""
        return {"maps": self._agent(policy).map_ids()}

    def tags(self) -> dict[str, Any]:
        """Every governed file."""
        return {
            "tags": [
                {**tag.as_json(), "policy": name}
                for name, agent in self.agents.items()
                for tag in list(agent.tags.values())
            ]
        }

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

    def ended(self) -> dict[str, Any]:
        """How the last policies ended."""
        return {"exits": self.exits}

    def stats(self) -> dict[str, Any]:
        """A snapshot of the observer; pagecache_bpf.observer says what is in it."""
        if self._observer:
            return self._observer.snapshot()
        return {
            "time_ns": time.time_ns(),
            "level": "off",
            "missing": [self._blind] if self._blind else [],
            "uncounted": [],
            "lost_events": 0,
            "models": [],
        }

    # --- the parts ---

    def _observe(self, fd: int, policy: str, model: str, path: str) -> None:
        """Count what the file's readers find; a policy works without, too."""
        try:
            if self._observer is None:
                self._observer = Observer()
                for pid in self._own:
                    self._observer.own(pid)
            self._observer.tag(fd, model, path=path, policy=policy, engine="agent")
        except (PagecacheError, OSError) as error:
            self._blind = str(error)

    def _started(self, pid: int) -> None:
        """What this process reads is prefetched and no access."""
        self._own.add(pid)
        if self._observer:
            self._observer.own(pid)

    def _forget(self, key: bytes) -> None:
        if self._observer:
            self._observer.untag(key)

    def tick(self) -> None:
        """Note policies that have ended themselves."""
        for name, agent in self.agents.items():
            if agent.exit is not None and not agent.exit_noted:
                agent.exit_noted = True
                code, message, hook = agent.exit
                self._ended(name, "policy", code, "the policy ended itself", message, hook)

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
        del self.exits[:-EXITS_KEPT]


_OPERATIONS = (
    *("attach", "detach", "tag", "untag", "untag_fd"),
    *("maps", "tags", "policies", "ended", "stats"),
)


def serve(listener: socket.socket) -> None:
    """Answer until the last policy is gone, and a moment longer."""
    service = Service()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    connections, last = 0, time.monotonic()
    try:
        # Whoever starts it connects a moment later.
        while service.agents or connections or time.monotonic() < last + _IDLE_SECONDS:
            for key, _ in selector.select(_TICK_SECONDS):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.settimeout(30)
                    selector.register(connection, selectors.EVENT_READ)
                    connections += 1
                    continue
                assert isinstance(key.fileobj, socket.socket)
                try:
                    alive = _answer(service, key.fileobj)
                except (OSError, ValueError):
                    alive = False
                if alive:
                    last = time.monotonic()
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    connections -= 1
            service.tick()
    finally:
        service.close()


def _answer(service: Service, connection: socket.socket) -> bool:
    """Take one request and answer it; False: the other side is gone."""
    line, fds, _, _ = socket.recv_fds(connection, _LINE_BYTES, 1)
    try:
        if not line:
            return False
        _, uid, _ = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        reply: dict[str, Any]
        try:
            if uid != 0:
                raise PrivilegeError("only root can talk to the agent", f"this is user {uid}")
            request = json.loads(line)
            operation = request.pop("op")
            if operation not in _OPERATIONS:
                raise UsageError(f"the agent has no operation {operation}")
            if fds:
                request["fd"] = fds[0]
            reply = getattr(service, operation)(**request)
        except PagecacheError as error:
            fields = {"what": error.what, "why": error.why, "fix": error.fix, "docs": error.docs}
            reply = {"error": {**fields, "class": type(error).__name__}}
        except OSError as error:
            reply = {"error": {"what": "the agent failed", "why": str(error)}}
        connection.sendall(json.dumps(reply).encode() + b"\n")
        return True
    finally:
        for fd in fds:
            os.close(fd)


def main() -> int:
    """Take the place of the one agent, tell the starter by a byte on stdout, serve."""
    RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another agent runs already", flush=True)
        return 1
    with suppress(FileNotFoundError):
        SOCKET.unlink()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(str(SOCKET))
    os.chmod(SOCKET, 0o600)
    listener.listen(16)
    print("ready", flush=True)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    try:
        serve(listener)
    finally:
        with suppress(FileNotFoundError):
            SOCKET.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
