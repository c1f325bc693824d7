# SPDX-License-Identifier: Apache-2.0
"""Talks to the agent's process; the same interface as the module's control device.

Root only.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.ipc.client import HungUp, LineClient, answers
from pagecache_bpf.kernel.control_device import ExitRecord, PolicyStatus, Tag
from pagecache_bpf.policy.catalog import PolicyInfo

SOCKET = RUN_DIR / "agent.sock"
LOG = RUN_DIR / "agent.log"
#: A log that is longer when an agent starts is kept as agent.log.1, and the one before goes.
_LOG_BYTES = 1 << 20
_CHECK_MILLISECONDS = 50
#: One that was there may be about to end, and one that was started may be killed.
_STARTS = 3
#: How Python, the compiler and this package are found.
_ENVIRONMENT = frozenset(
    {"CLANG", "HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV"}
)
_ENVIRONMENT_PREFIXES = ("COVERAGE", "COV_", "LC_", "PAGECACHE_BPF_", "PYTHON")


def is_running(path: Path = SOCKET) -> bool:
    """Tell whether an agent answers.

    Args:
        path: the root socket.

    Returns:
        True if it does.
    """
    return answers(path)


def start(check: Callable[[], None] = lambda: None) -> None:
    """Start the agent's process unless it runs.

    It lends nothing to it of what is this process's: controller.inherited puts back the rest.

    Args:
        check: called every now and then; what it raises ends the waiting.

    Raises:
        PagecacheError: it did not start.
    """
    if is_running():
        return
    RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open_log() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pagecache_bpf.controller"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env=environment(os.environ),
        )
    assert process.stdout is not None
    with process.stdout as pipe:
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        while not ready.poll(_CHECK_MILLISECONDS):
            check()
        said = pipe.readline().decode(errors="replace").strip()
    # Another command may have been faster; what matters is that one answers.
    if said != "ready" and not is_running():
        raise PagecacheError(
            "the agent did not start", said or "it gave no reason", f"Read the end of {LOG}"
        )


def _open_log() -> IO[bytes]:
    """Open the agent's log to be added to; a long one becomes the previous one first.

    /run is memory, and often small.
    """
    with suppress(OSError):
        if LOG.stat().st_size > _LOG_BYTES:
            LOG.replace(LOG.with_suffix(".log.1"))
    return LOG.open("ab")


def connect(path: Path = SOCKET) -> AgentDevice | None:
    """Connect to the agent that runs, and have it answer: from then on it stays.

    One without policies ends after a moment, and may be doing so when it is connected to.

    Args:
        path: the root socket.

    Returns:
        The connection; None: no agent runs, or it was about to end.

    Raises:
        PagecacheError: it does not answer, or refuses this process.
    """
    if not is_running(path):
        return None
    try:
        agent = AgentDevice(path)
    except PagecacheError:  # it has ended since
        return None
    try:
        agent.request("ended")
    except HungUp:
        return None
    except BaseException:
        agent.disconnect()
        raise
    return agent


def connect_started(check: Callable[[], None] = lambda: None) -> AgentDevice:
    """Connect to the agent, and start its process if none runs.

    Args:
        check: as for start().

    Returns:
        The connection; the agent has answered on it.

    Raises:
        PagecacheError: it did not start, or ended before it answered.
    """
    for _ in range(_STARTS):
        start(check)
        if (agent := connect()) is not None:
            return agent
    raise PagecacheError(
        "the agent did not stay",
        f"it was started {_STARTS} times and ended each time before it answered",
        f"Read the end of {LOG}",
    )


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Choose what of a process's environment the agent is given.

    What a server has set for itself, such as LD_PRELOAD or the number of its threads, is not meant
    for it.

    Args:
        own: that process's environment.

    Returns:
        The variables that are passed on.
    """
    return {
        name: value
        for name, value in own.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }


class AgentDevice(LineClient):
    """A connection to the agent's process.  A context manager.

    It has the interface of the module's control device.  Every method raises PagecacheError, in
    the class that the agent gave.
    """

    server = "the agent"
    log_hint = f"See {LOG}"
    answer_bytes = 1 << 30  # every tag of every file

    def __init__(self, path: Path = SOCKET) -> None:
        """Connect.

        Args:
            path: the root socket.

        Raises:
            PagecacheError: no agent answers; see is_running() and start().
        """
        super().__init__(path)

    @classmethod
    def connect_error(cls, path: Path, error: OSError) -> PagecacheError:
        """Make the error for a socket that cannot be connected to.

        Args:
            path: the socket.
            error: what connect(2) said.

        Returns:
            An error that says what to do.
        """
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            return PagecacheError(
                "no controller runs",
                f"nobody listens on {path}",
                "`pagecache-bpf serve` starts one; a policy that is attached on engine agent is "
                "one, too",
            )
        return PagecacheError("the agent does not answer", str(error))

    def attach(
        self,
        info: PolicyInfo,
        obj: Path,
        knobs: Mapping[str, int],
        sizes: Mapping[str, int] | None = None,
        *,
        lease: bool = False,
    ) -> list[str]:
        """Attach a policy.

        Args:
            info: the policy.
            obj: its object for engine agent.
            knobs: numbers that are set before it runs, by name.
            sizes: elements that maps must have room for, by name.
            lease: detach it when this connection ends, unless it governs files by then that are
                nobody's lease.

        Returns:
            The events that nothing tells of on this kernel.
        """
        # The agent's process finds the policy by itself: a shipped one by its name.
        source = info.name if info.object is None else str(info.object)
        reply = self.request(
            "attach",
            policy=source,
            object=str(obj),
            knobs=dict(knobs),
            sizes=dict(sizes or {}),
            lease=lease,
        )
        return list(reply["missing"])

    def detach(self, name: str) -> ExitRecord:
        """End a policy.

        Args:
            name: the policy's.

        Returns:
            How it ended.

        Raises:
            UsageError: it is not attached.
        """
        return ExitRecord(**self.request("detach", policy=name)["exit"])

    def map_ids(self, policy: str) -> dict[str, int]:
        """Return the kernel's numbers of a policy's maps.

        Args:
            policy: its name.

        Returns:
            Numbers by the maps' names.

        Raises:
            UsageError: the policy is not attached.
        """
        return dict(self.request("maps", policy=policy)["maps"])

    def tag(
        self,
        fd: int,
        *,
        policy: str,
        model: str,
        path: str,
        replace: bool = False,
        observe: bool = True,
        lease: bool = False,
    ) -> None:
        """Let an attached policy govern an open file.

        Args:
            fd: the file, open for reading.
            policy: the policy's name.
            model: the model that the file belongs to, a label of counters.
            path: where the agent opens it again.
            replace: take it over from another policy.
            observe: count who reads it.
            lease: take the tag off when this connection ends.
        """
        whose = {"policy": policy, "model": model, "path": path}
        self.request("tag", (fd,), **whose, replace=replace, observe=observe, lease=lease)

    def tag_files(
        self,
        files: Mapping[int, str],
        *,
        policy: str,
        model: str,
        replace: bool = False,
        observe: bool = True,
        lease: bool = False,
    ) -> None:
        """Let an attached policy govern open files, by few requests.

        Args:
            files: the path of each, by its descriptor; they are tagged in this order.
            policy: as for tag().
            model: as for tag().
            replace: as for tag().
            observe: as for tag().
            lease: as for tag().

        Raises:
            PagecacheError: one was not tagged; those before it were.
        """
        same = {"policy": policy, "model": model, "replace": replace, "observe": observe}
        requests = [{"op": "tag", **same, "path": path, "lease": lease} for path in files.values()]
        self.batch(requests, list(files))

    def observe(self, fd: int, *, policy: str, model: str, path: str) -> None:
        """Observe an open file that a policy of engine struct_ops governs.

        Args:
            fd: the file's descriptor.
            policy: the policy's name.
            model: the name that statistics have for the file's model.
            path: for people to read.
        """
        self.request("observe", (fd,), policy=policy, model=model, path=path)

    def unobserve(self, policy: str) -> None:
        """Let go of what is observed for a policy of engine struct_ops.

        Args:
            policy: its name.
        """
        self.request("unobserve", policy=policy)

    def stats(self) -> dict[str, Any]:
        """Return what the observer has counted.

        Returns:
            Keys and values as pagecache_bpf.observer describes them.
        """
        return self.request("stats")

    def untag_fd(self, fd: int) -> None:
        """Take the tag off an open file.

        Args:
            fd: the file's descriptor.

        Raises:
            UsageError: it has none.
        """
        if not self.request("untag_fd", (fd,))["found"]:
            raise UsageError(f"file descriptor {fd} is not tagged")

    def untag(self, dev_major: int, dev_minor: int, ino: int, generation: int) -> None:
        """Take the tag off a file that is known by its identity only.

        Args:
            dev_major: major number of the file system's device.
            dev_minor: its minor number.
            ino: the inode's number.
            generation: the inode's generation, as the tag has it.

        Raises:
            UsageError: the file has no tag.
        """
        identity = {"dev_major": dev_major, "dev_minor": dev_minor, "generation": generation}
        if not self.request("untag", ino=ino, **identity)["found"]:
            raise UsageError(f"inode {ino} of device {dev_major}:{dev_minor} is not tagged")

    def untag_all(self, identities: Sequence[tuple[int, int, int, int]]) -> list[bool]:
        """Take the tags off files that are known by their identities only, by few requests.

        Args:
            identities: of each file as Tag.identity has it.

        Returns:
            Of each whether it was tagged.

        Raises:
            PagecacheError: the agent does not answer, or one could not be untagged.
        """
        names = ("dev_major", "dev_minor", "ino", "generation")
        requests = [
            {"op": "untag", **dict(zip(names, identity, strict=True))} for identity in identities
        ]
        return [bool(answer["found"]) for answer in self.batch(requests)]

    def admit(self, model: str, files: Mapping[str, int], budget: int | None) -> dict[str, Any]:
        """Have a model admitted to the memory that the controller hands out.

        Args:
            model: its name.
            files: sizes in bytes by key_of() in hexadecimal digits.
            budget: bytes that it may take at most, None for all of it.

        Returns:
            The decision, as the controller tells it.

        Raises:
            PagecacheError: the model does not fit.
        """
        return self.request("admit", model=model, files=dict(files), budget=budget)

    def release(self, model: str) -> None:
        """Take back what admit() has noted.

        Args:
            model: the name it was admitted by.
        """
        self.request("release", model=model)

    def controller(self) -> dict[str, Any]:
        """Return the state of the controller, and which model holds how much.

        Returns:
            Keys and values as pagecache_bpf.cli.budget.HELD_JSON describes them.
        """
        return self.request("controller")

    def tags(self) -> Iterator[Tag]:
        """Yield every file that a policy of the agent governs.

        Yields:
            Tags, the oldest first.
        """
        for tag in self.request("tags")["tags"]:
            yield Tag(**tag, active=True)

    def policies(self) -> Iterator[PolicyStatus]:
        """Yield every policy that the agent runs.

        Yields:
            Policies with their counters.
        """
        for policy in self.request("policies")["policies"]:
            yield PolicyStatus(
                name=policy["name"],
                attached_ns=policy["attached_ns"],
                governed_pages=policy["governed_pages"],
                inflight_pages=policy["inflight_pages"],
                hooks=tuple(policy["hooks"]),
                tags=policy["tags"],
                kept_pages=0,
                keep_max_pages=0,
                counters=policy["counters"],
            )

    def details(self) -> dict[str, Any]:
        """Return what `status` shows of the agent's policies beside their counters.

        Returns:
            Knobs, missing events and so on, by policy.
        """
        answer = self.request("policies")
        found = {policy["name"]: policy for policy in answer["policies"]}
        return {**found, **{name: {"ended": True} for name in answer["ended"]}}

    def exits(self, since: int = 0) -> Iterator[ExitRecord]:
        """Yield how the agent's last policies ended.

        Args:
            since: only records whose sequence number is greater than this.

        Yields:
            Records, the oldest first.
        """
        for record in self.request("ended")["exits"]:
            if record["seq"] > since:
                yield ExitRecord(**record)
