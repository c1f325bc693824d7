# SPDX-License-Identifier: Apache-2.0
"""The controller's hold on both engines: attach what loads need, tag, untag, look up.

The agent's policies run in this process (agent.service.Service); those of the module are the
kernel's, reached through its control device, and outlive the controller.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from pagecache_bpf.agent.service import Service
from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.errors import PagecacheError, UnsupportedError
from pagecache_bpf.kernel import abi, kmod
from pagecache_bpf.kernel.control_device import Device
from pagecache_bpf.policy import catalog, loader

STRUCT_OPS, AGENT = "struct_ops", "agent"
_log = logging.getLogger(__name__)
_Identity = tuple[int, int, int, int]


@lru_cache(maxsize=64)
def policy_info(name: str) -> catalog.PolicyInfo:
    """Return what is known of a policy; read once, as that takes 20 ms and each load asks.

    Args:
        name: its name, or the path of its source or object.

    Raises:
        UsageError: there is no such policy.
    """
    return catalog.find(name)


@dataclass(frozen=True)
class PlacedTag:
    """A tag that the controller has set: on which engine, for which policy, of which file."""

    engine: str
    policy: str
    key: bytes
    identity: _Identity | None = None  # the module's


class EngineControl:
    """Attaches, tags and looks up on both engines.

    Args:
        service: the policies of engine agent, in this process.
        lock: what the root socket's operations hold, too; every method here takes it.
    """

    def __init__(self, service: Service, lock: threading.RLock) -> None:
        self.service = service
        self.lock = lock
        self.own: dict[str, str] = {}  # policies attached here, with their engines

    def best(self, wanted: str = "auto") -> tuple[str, str]:
        """Choose the engine to attach a policy on; loads the kernel module if it may be used.

        Args:
            wanted: the engine that is asked for: auto, struct_ops or agent.

        Returns:
            The engine, and why it is not a better one.

        Raises:
            UnsupportedError: struct_ops is asked for and cannot be had.
        """
        if wanted == AGENT:
            return AGENT, "engine agent was asked for"
        try:
            kmod.load()
        except UnsupportedError as error:
            if wanted == STRUCT_OPS:
                raise
            return AGENT, f"no struct_ops: {error.what}"
        return STRUCT_OPS, ""

    def expected(self, wanted: str = "auto") -> tuple[str, str]:
        """Tell the engine that the next policy would get; nothing is changed.

        Args:
            wanted: the engine that is asked for: auto, struct_ops or agent.

        Returns:
            The engine, and why it is not a better one.
        """
        if wanted != AGENT and kmod.is_loaded():
            return STRUCT_OPS, ""
        return AGENT, "" if wanted == AGENT else "the kernel module is not loaded"

    def attached(self) -> dict[str, str]:
        """Return the engine of each policy that is attached now."""
        with self.lock:
            found = {
                name: AGENT for name, agent in self.service.agents.items() if agent.exit is None
            }
            if kmod.is_loaded():
                with suppress(PagecacheError), Device() as device:
                    found.update({policy.name: STRUCT_OPS for policy in device.policies()})
            return found

    def ensure(
        self,
        policy: str,
        knobs: Mapping[str, int] | None = None,
        wanted: str = "auto",
        sizes: Mapping[str, int] | None = None,
    ) -> tuple[str, str]:
        """Attach a policy unless it is attached.

        Args:
            policy: its name, or the path of its source or object.
            knobs: values by name; the others are the defaults.
            wanted: the engine that is asked for: auto, struct_ops or agent.
            sizes: elements that its maps must have room for, by name.

        Returns:
            Its engine, and why it is not a better one.

        Raises:
            PagecacheError: it cannot be attached.
        """
        with self.lock:
            here = self.attached()
            info = policy_info(policy)
            if info.name in here:
                return here[info.name], ""
            engine, why = self.best(wanted)
            if engine == STRUCT_OPS:
                loader.attach(info, knobs, sizes=sizes)
            else:
                if info.name in self.service.agents:  # it has ended by itself
                    self.service.detach(info.name)
                self.service.attach(*_source(info), dict(knobs or {}), dict(sizes or {}))
            self.own[info.name] = engine
            _log.info("attached %s on engine %s", info.name, engine)
            return engine, why

    def prepare(self, policy: str, knobs: Mapping[str, int], wanted: str = "auto") -> None:
        """Load a policy that the first load will want, where engine agent will run it.

        Args:
            policy: its name, or the path of its source or object.
            knobs: values by knob; a knob that is not named has its default.
            wanted: the engine that is asked for.
        """
        if wanted != AGENT and (kmod.is_loaded() or kmod.find(platform.release())):
            return  # what the module runs cannot be loaded without being attached
        if wanted == STRUCT_OPS:
            return
        with self.lock:
            info = policy_info(policy)
            if info.name not in self.attached():
                self.service.prepare(*_source(info), dict(knobs))

    def governor_of(self, file: ClientFile) -> str | None:
        """Find the policy that governs a file.

        Args:
            file: a file that a client has passed.

        Returns:
            The policy's name; None if none does.
        """
        return self.governors([file]).get(file.key)

    def governors(self, files: Sequence[ClientFile]) -> dict[bytes, str]:
        """Find the policies that govern some files.

        Args:
            files: files that a client has passed.

        Returns:
            Policies by the key of the file; a file that none governs is left out.
        """
        found = {}
        with self.lock:
            for name, agent in self.service.agents.items():
                if agent.exit is None:
                    found.update({file.key: name for file in files if file.key in agent.tags})
            if kmod.is_loaded():
                # The device of the pages may be another one (overlayfs, btrfs).
                wanted = {_inode(file.key): file.key for file in files}
                with suppress(PagecacheError), Device() as device:
                    for tag in device.tags():
                        key = wanted.get((tag.ino, tag.generation))
                        if tag.active and key is not None:
                            found[key] = tag.policy
        return found

    def tagged_models(self) -> set[str]:
        """Return the names of the models that files are tagged for."""
        with self.lock:
            agents = self.service.agents.values()
            found = {tag.model for agent in agents for tag in agent.tags.values()}
            if kmod.is_loaded():
                with suppress(PagecacheError), Device() as device:
                    found.update(tag.model for tag in device.tags())
            return found

    def tag(self, fd: int, file: ClientFile, policy: str, engine: str, model: str) -> PlacedTag:
        """Have a policy govern an open file.

        Args:
            fd: the file, open for reading; it stays the caller's.
            file: what it is.
            policy: the policy, which is attached.
            engine: the engine that it runs on.
            model: the name that its reads are counted under.

        Returns:
            What untag() takes.

        Raises:
            UsageError: it is tagged already, or cannot be opened.
        """
        with self.lock:
            if engine == AGENT:
                # Held open: its path may lead to another file, or to none from here.
                self.service.tag(fd, policy, model, file.path, False, hold=True)
                return PlacedTag(AGENT, policy, file.key)
            with Device() as device:
                device.tag(fd, policy=policy, model=model, path=file.path)
            self.service.observe(fd, policy, model, file.path)
            return PlacedTag(STRUCT_OPS, policy, file.key)

    def locate(
        self, placed: Mapping[bytes, PlacedTag], files: Sequence[ClientFile]
    ) -> dict[bytes, PlacedTag]:
        """Complete tags with the identities that the module knows them by, to untag them.

        Args:
            placed: tags by the key of the file.
            files: files that a client has passed.

        Returns:
            The same tags.
        """
        keys = {_inode(file.key): file.key for file in files if file.key in placed}
        found = dict(placed)
        if any(tag.engine == STRUCT_OPS for tag in placed.values()):
            with self.lock, suppress(PagecacheError), Device() as device:
                for tag in device.tags():
                    key = keys.get((tag.ino, tag.generation))
                    if key is not None and placed[key].engine == STRUCT_OPS:
                        found[key] = replace(placed[key], identity=tag.identity)
        return found

    def tag_keys(self, policy: str, engine: str, files: Sequence[ClientFile]) -> dict[int, bytes]:
        """Return how a policy's programs know those of these files that are tagged.

        Args:
            policy: the policy that governs them.
            engine: the engine that it runs on.
            files: files that a client has passed.

        Returns:
            Keys, as bytes of struct pagecache_file_key, by the number of the file.
        """
        if engine == AGENT:
            with self.lock:
                agent = self.service.agents.get(policy)
                tags = agent.tags if agent is not None else {}
                return {n: file.key for n, file in enumerate(files) if file.key in tags}
        numbers = {_inode(file.key): number for number, file in enumerate(files)}
        found = {}
        with self.lock, Device() as device:
            for tag in device.tags():
                number = numbers.get((tag.ino, tag.generation))
                if tag.policy == policy and number is not None:
                    found[number] = bytes(
                        abi.pagecache_file_key(
                            ino=tag.ino,
                            dev_major=tag.dev_major,
                            dev_minor=tag.dev_minor,
                            generation=tag.generation,
                        )
                    )
        return found

    def map_ids(self, policy: str) -> dict[str, int]:
        """Return the kernel's numbers of the maps of a policy of engine agent.

        Args:
            policy: name of an attached policy.

        Returns:
            Numbers by the name of the map.

        Raises:
            UsageError: it is not attached.
        """
        with self.lock:
            return dict(self.service.maps(policy)["maps"])

    def untag(self, placed: PlacedTag) -> None:
        """Take back a tag; one that is gone already is no error.

        Args:
            placed: as tag() or locate() returned it.
        """
        with self.lock:
            self.service.observed.forget(placed.key)
            if placed.engine == AGENT:
                agent = self.service.agents.get(placed.policy)
                if agent is not None:
                    agent.untag(placed.key)
            elif placed.identity is not None and kmod.is_loaded():
                with suppress(PagecacheError), Device() as device:
                    device.untag(*placed.identity)

    def settle(self, seconds: float) -> None:
        """Wait until nothing is being read of files that were untagged.

        Pages that are being read cannot be dropped.

        Args:
            seconds: how long at most.
        """
        until = time.monotonic() + seconds
        with self.lock:
            agents = list(self.service.agents.values())
        for agent in agents:  # without the lock: others go on
            agent.settle(max(0.0, until - time.monotonic()))

    def observed(self, model: str) -> dict[str, int] | None:
        """Return what the observer has counted for a model.

        Args:
            model: its name.

        Returns:
            Counters by name; None: nothing is known of it, or there is no observer.
        """
        return self.observed_by_model().get(model)

    def observed_by_model(self) -> dict[str, dict[str, int]]:
        """Return what the observer has counted for each model; nothing without one."""
        with self.lock, suppress(PagecacheError):
            return self.service.observed.counters()
        return {}

    def close(self, keep: bool) -> None:
        """Detach what was attached here.

        Args:
            keep: leave what the module runs.
        """
        with self.lock:
            for name, engine in self.own.items():
                if engine == STRUCT_OPS and not keep:
                    with suppress(PagecacheError):
                        loader.detach(name)
            self.own.clear()
            self.service.close()


def _source(info: catalog.PolicyInfo) -> tuple[str, str]:
    """Return a policy's name or own object file, for the service, and the object to load."""
    source = info.name if info.object is None else str(info.object)
    return source, str(catalog.agent_object(info))


def _inode(key: bytes) -> tuple[int, int]:
    raw = abi.pagecache_file_key.from_buffer_copy(key)
    return raw.ino, raw.generation
