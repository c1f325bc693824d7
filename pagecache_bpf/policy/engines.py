# SPDX-License-Identifier: Apache-2.0
"""Both engines behind one face: the module's control device and the agent's process.

A policy is attached on one engine at a time, and a file is governed by one policy, whichever
engine that runs on.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """What is attached and tagged here, on either engine.  Use it as a context manager.

    module, agent: None when the module is not loaded, when no agent runs.  observe: whether
    the readers of files tagged from here are counted.  Raises
    PrivilegeError, UnsupportedError (a module of another version).
    """

    def __init__(self, observe: bool = True) -> None:
        self._observe = observe and wanted()
        with ExitStack() as stack:
            self.module = stack.enter_context(Device()) if kmod.is_loaded() else None
            self.agent = stack.enter_context(AgentDevice()) if agent_device.is_running() else None
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
        if self.module:
            yield STRUCT_OPS, self.module
        if self.agent:
            yield AGENT, self.agent

    def engine_of(self, policy: str) -> str | None:
        """The engine that a policy is attached on; None if it is not attached."""
        for engine, device in self._engines():
            if any(each.name == policy for each in device.policies()):
                return engine
        return None

    def policies(self) -> Iterator[tuple[str, PolicyStatus]]:
        """Every attached policy with its engine."""
        for engine, device in self._engines():
            for each in device.policies():
                yield engine, each

    def tags(self) -> Iterator[Tag]:
        """Every tagged file."""
        for _, device in self._engines():
            yield from device.tags()

    def exits(self) -> list[ExitRecord]:
        """How the last policies ended, oldest first."""
        found = [record for _, device in self._engines() for record in device.exits()]
        if self.agent is None:
            found += [ExitRecord(**record) for record in exit_history.read()]
        return sorted(found, key=lambda each: each.time_ns)

    def tag(self, fd: int, *, policy: str, model: str, path: str, replace: bool = False) -> None:
        """Let an attached policy govern the open file.  Raises as Device.tag() does."""
        target = self._targets.get(policy)
        if target is None:  # a model may have 100,000 files
            target = self._targets[policy] = self._device_of(policy)
        for _, device in self._engines():
            if device is not target and replace:
                try:
                    device.untag_fd(fd)
                except UsageError:
                    continue
        if isinstance(target, AgentDevice):
            observe = self._observe
            target.tag(fd, policy=policy, model=model, path=path, replace=replace, observe=observe)
            return
        target.tag(fd, policy=policy, model=model, path=path, replace=replace)
        if self._observe:
            self._observe_file(fd, policy, model, path)

    def _observe_file(self, fd: int, policy: str, model: str, path: str) -> None:
        """Have the agent's process count; the policy works without."""
        with suppress(PagecacheError):
            if self.agent is None:
                agent_device.start()
                self.agent = self._stack.enter_context(AgentDevice())
            self.agent.observe(fd, policy=policy, model=model, path=path)

    def untag_fd(self, fd: int) -> None:
        """Take the tag off the open file.  Raises UsageError if it has none."""
        self._each("untag_fd", fd)

    def untag(self, dev_major: int, dev_minor: int, ino: int, generation: int) -> None:
        """Take the tag off a file by its identity.  Raises UsageError if it has none."""
        self._each("untag", dev_major, dev_minor, ino, generation)

    def detach(self, policy: str) -> ExitRecord | None:
        """End a policy on whichever engine; see loader.detach()."""
        if self.agent and policy in self.agent.details():
            return self.agent.detach(policy)
        record = loader.detach(policy)
        if self.agent:
            self.agent.unobserve(policy)
        return record

    def attached(self) -> list[str]:
        """Names of the policies that `detach` can end."""
        names = loader.pinned() if self.module else []
        return names + (list(self.agent.details()) if self.agent else [])

    def _device_of(self, policy: str) -> Device | AgentDevice:
        engine = self.engine_of(policy)
        device = self.agent if engine == AGENT else self.module
        if engine is None or device is None:
            raise UsageError(f"the policy {policy} is not attached")
        return device

    def _each(self, operation: str, *arguments: int) -> None:
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
