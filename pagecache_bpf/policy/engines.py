# SPDX-License-Identifier: Apache-2.0
"""Asks both engines as one: the module's control device and the agent's process.

Policies and tags are looked for on either of them; it knows no policy by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel import kmod
from pagecache_bpf.kernel.control_device import Device, ExitRecord, PolicyStatus, Tag
from pagecache_bpf.policy import agent_device, exit_history, loader
from pagecache_bpf.policy.agent_device import AgentDevice
from pagecache_bpf.policy.observing import wanted

STRUCT_OPS, AGENT = "struct_ops", "agent"


class Engines:
    """What is attached and tagged here, on either engine.  A context manager.

    Attributes:
        module: the module's control device; None: the module is not loaded.
        agent: a connection to the agent's process; None: no agent runs.
    """

    def __init__(self, observe: bool = True, lease: AgentDevice | None = None) -> None:
        """Connect to what there is.

        Args:
            observe: whether the readers of files that are tagged from here are counted.
            lease: a connection to the agent that stays open; files tagged from here are governed
                for as long as it does.

        Raises:
            PrivilegeError: this takes root.
            UnsupportedError: the module is of another version.
        """
        self._observe = observe and wanted()
        self._lease = lease is not None
        with ExitStack() as stack:
            self.module = stack.enter_context(Device()) if kmod.is_loaded() else None
            self.agent = lease
            if lease is None and (found := agent_device.connect()) is not None:
                self.agent = stack.enter_context(found)
            self._stack = stack.pop_all()
        self._targets: dict[str, Device | AgentDevice] = {}

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _engines(self) -> Iterator[tuple[str, Device | AgentDevice]]:
        """Yield the engines that are there, with their names."""
        if self.module:
            yield STRUCT_OPS, self.module
        if self.agent:
            yield AGENT, self.agent

    def engine_of(self, policy: str) -> str | None:
        """Return the engine that a policy is attached on.

        Args:
            policy: its name.

        Returns:
            "struct_ops" or "agent", None if it is not attached.
        """
        for engine, device in self._engines():
            if any(status.name == policy for status in device.policies()):
                return engine
        return None

    def policies(self) -> Iterator[tuple[str, PolicyStatus]]:
        """Yield every attached policy with its engine.

        Yields:
            The engine's name and the policy with its counters.
        """
        for engine, device in self._engines():
            for status in device.policies():
                yield engine, status

    def tags(self) -> Iterator[Tag]:
        """Yield every tagged file.

        Yields:
            Tags, engine after engine, the oldest first.
        """
        for _, device in self._engines():
            yield from device.tags()

    def exits(self) -> list[ExitRecord]:
        """Return how the last policies ended.

        Returns:
            Records, the oldest first.
        """
        found = [record for _, device in self._engines() for record in device.exits()]
        if self.agent is None:
            found += [ExitRecord(**record) for record in exit_history.read()]
        return sorted(found, key=lambda record: record.time_ns)

    def tag(self, fd: int, *, policy: str, model: str, path: str, replace: bool = False) -> None:
        """Let an attached policy govern an open file.

        Args:
            fd: the file, open for reading.
            policy: the policy's name.
            model: the model that the file belongs to, a label of counters.
            path: how messages name the file.
            replace: take it over from another policy.

        Raises:
            UsageError: the policy is not attached, or the file is tagged already.
        """
        self.tag_files({fd: path}, policy=policy, model=model, replace=replace)

    def tag_files(
        self, files: Mapping[int, str], *, policy: str, model: str, replace: bool = False
    ) -> None:
        """Let an attached policy govern open files; engine agent is asked once for many of them.

        Args:
            files: how messages name each, by its descriptor; they are tagged in this order.
            policy: the policy's name.
            model: the model that the files belong to, a label of counters.
            replace: take them over from another policy.

        Raises:
            UsageError: the policy is not attached, or a file is tagged already; those before it
                were tagged.
        """
        target = self._targets.get(policy)
        if target is None:  # a model may have 100,000 files
            target = self._targets[policy] = self._device_of(policy)
        for _, device in self._engines():
            if device is not target and replace:
                for fd in files:
                    with suppress(UsageError):
                        device.untag_fd(fd)
        if isinstance(target, AgentDevice):
            target.tag_files(
                files,
                policy=policy,
                model=model,
                replace=replace,
                observe=self._observe,
                lease=self._lease,
            )
            return
        for fd, path in files.items():
            target.tag(fd, policy=policy, model=model, path=path, replace=replace)
            if self._observe:
                self._observe_file(fd, policy, model, path)

    def started_agent(self) -> AgentDevice:
        """Return the connection to the agent, whose process is started if none runs.

        Returns:
            The connection, as in `agent`.

        Raises:
            PagecacheError: it did not start.
        """
        if self.agent is None:
            self.agent = self._stack.enter_context(agent_device.connect_started())
        return self.agent

    def _observe_file(self, fd: int, policy: str, model: str, path: str) -> None:
        """Have the agent's process count a file's readers; the policy works without that."""
        with suppress(PagecacheError):
            self.started_agent().observe(fd, policy=policy, model=model, path=path)

    def untag_fd(self, fd: int) -> None:
        """Take the tag off an open file.

        Args:
            fd: the file's descriptor.

        Raises:
            UsageError: it has none.
        """
        self._on_both("untag_fd", fd)

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
        self._on_both("untag", dev_major, dev_minor, ino, generation)

    def untag_all(self, identities: Sequence[tuple[int, int, int, int]]) -> list[bool]:
        """Take the tags off files that are known by their identities only.

        Args:
            identities: of each file as Tag.identity has it.

        Returns:
            Of each whether one of the engines knew it.
        """
        found = [False] * len(identities)
        if self.module:
            for at, identity in enumerate(identities):
                with suppress(UsageError):
                    self.module.untag(*identity)
                    found[at] = True
        if self.agent:
            # It is told of all: what the module governs the agent's process observes.
            there = self.agent.untag_all(identities)
            found = [a or b for a, b in zip(found, there, strict=True)]
        return found

    def detach(self, policy: str) -> ExitRecord | None:
        """End a policy on whichever engine it is.

        Args:
            policy: its name.

        Returns:
            How it ended; None if the kernel did not report it in time, see loader.detach().

        Raises:
            UsageError: it is not attached.
        """
        if self.agent and policy in self.agent.details():
            return self.agent.detach(policy)
        record = loader.detach(policy)
        if self.agent:
            self.agent.unobserve(policy)
        return record

    def attached(self) -> list[str]:
        """Return the names of the policies that `detach` can end.

        Returns:
            The names, those of the module first.
        """
        names = loader.pinned() if self.module else []
        return names + (list(self.agent.details()) if self.agent else [])

    def _device_of(self, policy: str) -> Device | AgentDevice:
        """Return the engine that a policy is attached on.  Raises UsageError if it is on none."""
        engine = self.engine_of(policy)
        device = self.agent if engine == AGENT else self.module
        if engine is None or device is None:
            raise UsageError(f"the policy {policy} is not attached")
        return device

    def _on_both(self, operation: str, *arguments: int) -> None:
        """Untag a file on both engines, as the agent's process observes what the module governs.

        Raises UsageError if neither knows it.
        """
        error: PagecacheError | None = UsageError("it is not tagged", "no policy is attached")
        # Both are told: what the module governs the agent's process observes.
        for _, device in self._engines():
            try:
                getattr(device, operation)(*arguments)
            except UsageError as caught:
                error = error and caught
            else:
                error = None
        if error:
            raise error
