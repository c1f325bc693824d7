# SPDX-License-Identifier: Apache-2.0
"""Talks to the agent's process; the same interface as the module's control device.

Root only.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pagecache_bpf import errors
from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.control_device import ExitRecord, PolicyStatus, Tag
from pagecache_bpf.policy.catalog import PolicyInfo

SOCKET = RUN_DIR / "agent.sock"
LOG = RUN_DIR / "agent.log"
SECONDS = 60.0


def is_running(path: Path = SOCKET) -> bool:
    """Whether an agent answers."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except OSError:
        return False
    return True


def start() -> None:
    """Start the agent's process unless it runs.  Raises PagecacheError."""
    if is_running():
        return
    RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pagecache_bpf.controller"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    assert process.stdout is not None
    with process.stdout:
        said = process.stdout.readline().decode(errors="replace").strip()
    # Another command may have been faster; what matters is that one answers.
    if said != "ready" and not is_running():
        raise PagecacheError(
            "the agent did not start", said or "it gave no reason", f"Read the end of {LOG}"
        )


class AgentDevice:
    """A connection to the agent.  Use it as a context manager.

    Raises PagecacheError when no agent answers; see is_running() and start().
    """

    def __init__(self, path: Path = SOCKET) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise PagecacheError("the agent does not answer", str(error)) from error
        self._buffer = b""

    def __enter__(self) -> AgentDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    @property
    def pid(self) -> int:
        """The agent's process."""
        size = struct.calcsize("3i")
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", raw)[0])

    def attach(
        self,
        info: PolicyInfo,
        obj: Path,
        knobs: Mapping[str, int],
        sizes: Mapping[str, int] | None = None,
    ) -> list[str]:
        """Attach a policy; returns the tracepoints that this kernel lacks.

        sizes: elements that maps must have room for, by name.
        """
        # The agent's process finds the policy by itself: a shipped one by its name.
        source = info.name if info.object is None else str(info.object)
        reply = self._ask(
            "attach", policy=source, object=str(obj), knobs=dict(knobs), sizes=dict(sizes or {})
        )
        return list(reply["missing"])

    def detach(self, name: str) -> ExitRecord:
        """End a policy."""
        return ExitRecord(**self._ask("detach", policy=name)["exit"])

    def map_ids(self, policy: str) -> dict[str, int]:
        """The kernel's numbers of a policy's maps.  Raises UsageError if it is not attached."""
        return dict(self._ask("maps", policy=policy)["maps"])

    def tag(
        self,
        fd: int,
        *,
        policy: str,
        model: str,
        path: str,
        replace: bool = False,
        observe: bool = True,
    ) -> None:
        """Let an attached policy govern the open file."""
        whose = {"policy": policy, "model": model, "path": path}
        self._ask("tag", fd, **whose, replace=replace, observe=observe)

    def observe(self, fd: int, *, policy: str, model: str, path: str) -> None:
        """Observe an open file that a policy of engine struct_ops governs."""
        self._ask("observe", fd, policy=policy, model=model, path=path)

    def unobserve(self, policy: str) -> None:
        """Let go of what is observed for such a policy."""
        self._ask("unobserve", policy=policy)

    def stats(self) -> dict[str, Any]:
        """A snapshot of the observer; pagecache_bpf.observer says what is in it."""
        return self._ask("stats")

    def untag_fd(self, fd: int) -> None:
        """Take the tag off the open file.  Raises UsageError if it has none."""
        if not self._ask("untag_fd", fd)["found"]:
            raise UsageError(f"file descriptor {fd} is not tagged")

    def untag(self, dev_major: int, dev_minor: int, ino: int, generation: int) -> None:
        """Take the tag off a file by its identity.  Raises UsageError if it has none."""
        identity = {"dev_major": dev_major, "dev_minor": dev_minor, "generation": generation}
        if not self._ask("untag", ino=ino, **identity)["found"]:
            raise UsageError(f"inode {ino} of device {dev_major}:{dev_minor} is not tagged")

    def admit(self, model: str, files: Mapping[str, int], budget: int | None) -> dict[str, Any]:
        """Have a model admitted: files by key_of() in hex, with their sizes.

        Raises PagecacheError when it does not fit.
        """
        return self._ask("admit", model=model, files=dict(files), budget=budget)

    def release(self, model: str) -> None:
        """Take back what admit() has noted."""
        self._ask("release", model=model)

    def controller(self) -> dict[str, Any]:
        """The controller and who holds what; see pagecache_bpf.cli.budget.HELD_JSON."""
        return self._ask("controller")

    def tags(self) -> Iterator[Tag]:
        """Every governed file."""
        for each in self._ask("tags")["tags"]:
            yield Tag(**each, active=True)

    def policies(self) -> Iterator[PolicyStatus]:
        """Every attached policy."""
        for each in self._ask("policies")["policies"]:
            yield PolicyStatus(
                name=each["name"],
                attached_ns=each["attached_ns"],
                governed_pages=each["governed_pages"],
                inflight_pages=each["inflight_pages"],
                hooks=tuple(each["hooks"]),
                tags=each["tags"],
                kept_pages=0,
                keep_max_pages=0,
                counters=each["counters"],
            )

    def details(self) -> dict[str, Any]:
        """What `status` shows beside: knobs, missing tracepoints and so on, by policy."""
        answer = self._ask("policies")
        found = {each["name"]: each for each in answer["policies"]}
        return {**found, **{name: {"ended": True} for name in answer["ended"]}}

    def exits(self, since: int = 0) -> Iterator[ExitRecord]:
        """How the last policies ended; only records behind seq `since`."""
        for each in self._ask("ended")["exits"]:
            if each["seq"] > since:
                yield ExitRecord(**each)

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Any operation of the agent's that takes no file.  Raises PagecacheError."""
        return self._ask(operation, **arguments)

    def _ask(self, operation: str, fd: int | None = None, **arguments: Any) -> dict[str, Any]:
        line = json.dumps({"op": operation, **arguments}).encode() + b"\n"
        try:
            # Whoever hangs up before the end of a request has said why.
            with suppress(BrokenPipeError, ConnectionResetError):
                if fd is None:
                    self._socket.sendall(line)
                else:
                    socket.send_fds(self._socket, [line], [fd])
            reply = json.loads(self._line())
        except (OSError, ValueError) as error:
            raise PagecacheError(
                "the agent does not answer", str(error) or "it hung up", f"See {LOG}"
            ) from error
        if "error" in reply:
            fields = dict(reply["error"])
            kind = getattr(errors, fields.pop("class", ""), PagecacheError)
            raise kind(**fields)
        return dict(reply)

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            data = self._socket.recv(1 << 20)
            if not data:
                raise OSError("it hung up")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
