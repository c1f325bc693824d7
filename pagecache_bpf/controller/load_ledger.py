# SPDX-License-Identifier: Apache-2.0
"""Loads: a client's files under a policy, for as long as the client lives.

The ledger knows every open load, which files they share, and which tags were set for them.  A tag
goes with the last load that needs it; tags of root stay.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.agent.read_threads import drop as drop_pages
from pagecache_bpf.controller.admission import Budgets, Claim, Decision
from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.engine_control import EngineControl, PlacedTag
from pagecache_bpf.controller.load_templates import LoadTemplates, keys_of
from pagecache_bpf.controller.node_hints import NodeHints, node_of
from pagecache_bpf.controller.processes import DiskDelays
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

if TYPE_CHECKING:
    from pagecache_bpf.templates.policy_arrays import Assigned

#: For what is being read of a load's files when it is over; the disk gives the rest soon.
_SETTLE_SECONDS = 10.0

_log = logging.getLogger(__name__)


@dataclass
class Load:
    """One load; times are of the monotonic clock, sizes in bytes."""

    id: str
    model: str
    uid: int
    pid: int
    files: tuple[ClientFile, ...]
    decision: Decision
    budget: int | None
    devices: tuple[dict[str, Any], ...] = ()
    keep: bool = False
    policy: str | None = None
    engine: str | None = None
    why: str = ""
    opened: float = field(default_factory=time.monotonic)
    closed: float | None = None
    resident_at_open: int = 0
    dropped: int = 0
    delay_at_open: int | None = None
    delay: int | None = None
    counted_at_open: dict[str, int] | None = None
    counted: dict[str, int] | None = None
    node: int | None = None
    template: str | None = None
    template_why: str = ""

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)


class LoadLedger:
    """Every open load.  Its methods may be called from any thread."""

    def __init__(
        self, engines: EngineControl, budgets: Budgets, changed: Callable[[], None] = lambda: None
    ) -> None:
        """changed: called, holding no lock, when tags have been set or taken off."""
        self.engines = engines
        self._changed = changed
        self.budgets = budgets
        self.loads: dict[str, Load] = {}
        self.templates = LoadTemplates(engines)
        self.hints = NodeHints(engines)
        self.delays: DiskDelays | None = None
        self._lock = threading.RLock()
        self._users: dict[bytes, set[str]] = {}  # file -> loads that read it
        self._placed: dict[bytes, PlacedTag] = {}  # tags that were set for loads

    def admit(
        self,
        files: Sequence[ClientFile],
        *,
        model: str,
        uid: int,
        pid: int,
        budget: int | None,
        keep: bool,
        devices: Sequence[dict[str, Any]] = (),
        behind: bool = False,
    ) -> tuple[Load | None, Decision]:
        """Judge a load and, if it may run, take note of it; place() has to follow.

        behind: others wait already, so this one has to queue up.
        """
        sizes = {file.key: file.size for file in files}
        with self._lock:
            name = self._own_name(model, uid)
            decision = self.budgets.decide(name, sizes, budget, headroom(pid))
            if behind and self.budgets.rule == "queue" and decision.kind != "refuse":
                decision = Decision("queue", 0, f"{decision.message}; others wait already")
            if decision.kind in ("queue", "refuse"):
                return None, decision
            bound = self.budgets.of_model(name, budget)
            load = Load(
                secrets.token_hex(8),
                name,
                uid,
                pid,
                tuple({file.key: file for file in files}.values()),
                decision,
                decision.granted if decision.kind == "stream" else bound,
                tuple(devices),
                keep,
            )
            self.budgets.claim(load.id, Claim(name, uid, sizes, decision.granted))
            self.loads[load.id] = load
            for key in sizes:
                self._users.setdefault(key, set()).add(load.id)
        return load, decision

    def place(
        self,
        load: Load,
        fds: Sequence[int],
        policy: str,
        *,
        knobs: Mapping[str, int],
        wanted: str,
        template: Path | None,
    ) -> None:
        """Put the load's files under a policy; one that cannot be had leaves it to the kernel.

        fds: open descriptors of load.files, in that order.  knobs, wanted: for a policy that is
        not attached yet, its knobs and engine.  template: its text; None: derived.
        """
        load.resident_at_open = sum(_resident(fd) for fd in fds)
        self.delays = self.delays or DiskDelays()
        load.delay_at_open = self.delays.of(load.pid)
        assigned = None
        try:
            assigned = self.templates.prepare(policy, load.model, load.files, fds, template)
        except PagecacheError as error:
            load.template_why = str(error)
        sizes = self.templates.sizes(assigned)
        try:
            engine, load.why = self.engines.ensure(policy, knobs, wanted, sizes)
        except PagecacheError as error:
            load.why = f"no policy: {error}"
            return
        governed: list[str] = []
        with self._lock:
            if load.closed is not None:
                return
            taken = self.engines.governors(load.files)
            fresh: dict[bytes, PlacedTag] = {}
            for fd, file in zip(fds, load.files, strict=True):
                try:
                    by = taken.get(file.key)
                    if by is None:
                        fresh[file.key] = self.engines.tag(fd, file, policy, engine, load.model)
                        by = policy
                    governed.append(by)
                except PagecacheError as error:
                    load.why = str(error)
            self._placed.update(self.engines.locate(fresh, load.files))
        if governed:
            load.counted_at_open = self.engines.observed(load.model) or {}
            # What root has put under another policy stays there.
            load.policy = policy if policy in governed else governed[0]
            load.engine = self.engines.attached().get(load.policy)
            node = node_of(load.devices) if load.devices else None
            if load.engine and self.hints.give(load.id, load.pid, load.policy, load.engine, node):
                load.node = node
        self._changed()
        if assigned is not None and load.policy == policy:
            self._give(load, policy, engine, assigned)

    def _give(self, load: Load, policy: str, engine: str, assigned: Assigned) -> None:
        """Give the policy the load's template; without it, it finds the order by itself."""
        keys = keys_of(self.engines, policy, engine, load.files)
        try:
            self.templates.give(load.id, policy, assigned, keys)
        except PagecacheError as error:
            load.template_why = str(error)
        else:
            load.template = assigned.template.source
            if load.closed is not None:
                self.templates.forget(load.id)

    def end(self, load: Load, drop: bool = False) -> None:
        """The load is over: its tags go, its claim is free; drop: and pages nobody else uses."""
        with self._lock:
            if load.closed is not None:
                return
            load.closed = time.monotonic()
            load.delay = self._delay(load)
            load.counted = self._counted(load)
            del self.loads[load.id]
            self.budgets.release(load.id)
            unused = []
            for file in load.files:
                users = self._users.get(file.key, set())
                users.discard(load.id)
                if users:
                    continue
                self._users.pop(file.key, None)
                placed = self._placed.pop(file.key, None)
                if placed is not None:
                    self.engines.untag(placed)
                unused.append(file)
        self.templates.forget(load.id)
        self.hints.forget(load.id, load.pid)
        self._changed()
        if drop:
            self.engines.settle(_SETTLE_SECONDS)
            for file in unused:
                load.dropped += drop_file(file)

    def readers(self, key: bytes) -> set[str]:
        """Loads that read a file."""
        with self._lock:
            return set(self._users.get(key, ()))

    def placed(self) -> dict[bytes, PlacedTag]:
        """The tags that were set for loads, by file."""
        with self._lock:
            return dict(self._placed)

    def report(self, load: Load) -> dict[str, Any]:
        """A load as the protocol tells it."""
        delay = load.delay if load.closed is not None else self._delay(load)
        why = self.delays.why if self.delays else "nothing was asked yet"
        return {
            "load": load.id,
            "model": load.model,
            "state": "open" if load.closed is None else "done",
            "policy": load.policy,
            "engine": load.engine,
            "why": load.why,
            "files": len(load.files),
            "bytes": load.size,
            "budget_bytes": load.budget,
            "admission": load.decision.kind,
            "message": load.decision.message,
            "node": load.node,
            "seconds": (load.closed or time.monotonic()) - load.opened,
            "resident_at_open_bytes": load.resident_at_open,
            "resident_bytes": sum(resident(file) for file in load.files),
            "dropped_bytes": load.dropped,
            "io_delay_ns": delay,
            "io_delay_why": "" if delay is not None else why or "the process has ended",
            "template": load.template,
            "template_why": load.template_why,
            "counters": load.counted if load.closed is not None else self._counted(load),
        }

    def _delay(self, load: Load) -> int | None:
        now = self.delays.of(load.pid) if self.delays else None
        if now is None or load.delay_at_open is None:
            return None
        return now - load.delay_at_open

    def _counted(self, load: Load) -> dict[str, int] | None:
        """What the observer has counted for the model since the load was opened."""
        now = self.engines.observed(load.model)
        if now is None:
            return None
        before = load.counted_at_open or {}
        return {name: value - before.get(name, 0) for name, value in now.items()}

    def _own_name(self, model: str, uid: int) -> str:
        """Names are labels of counters: two users' models of one name must not be mixed."""
        if any(each.model == model and each.uid != uid for each in self.loads.values()):
            return f"{model[:52]}@{uid}"
        return model


def headroom(pid: int) -> int | None:
    """Bytes that a process's memory cgroup, and the machine, have room for; None: no bound."""
    found = [cgroups.host_memory().get("MemAvailable")]
    with suppress(PagecacheError):
        found.append(cgroups.of_process(pid).headroom)
    return min((each for each in found if each is not None), default=None)


def resident(file: ClientFile) -> int:
    """Bytes of a file in the page cache; 0 for one that is gone."""
    with suppress(PagecacheError, OSError):
        fd = file.open_again()
        try:
            return _resident(fd)
        finally:
            os.close(fd)
    return 0


def _resident(fd: int) -> int:
    with suppress(OSError):
        return cached_pages(fd) * PAGE_SIZE
    return 0


def drop_file(file: ClientFile) -> int:
    """Drop a file's pages; how many bytes went."""
    try:
        fd = file.open_again()
    except PagecacheError as error:
        _log.info("nothing dropped: %s", error)
        return 0
    try:
        return drop_pages(fd, 0, 0)
    finally:
        os.close(fd)
