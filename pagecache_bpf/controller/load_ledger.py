# SPDX-License-Identifier: Apache-2.0
"""Loads: a client's files under a policy, for as long as the client lives.

The ledger knows every open load, which files they share, and which tags were set for them.  A tag
goes with the last load that needs it; tags of root stay.  A load holds descriptors of its files
until it ends, so no path is ever followed on behalf of a client.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pagecache_bpf.controller.admission import MODEL_CLAIM, Budgets, Claim, Decision
from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.engine_control import STRUCT_OPS, EngineControl, PlacedTag
from pagecache_bpf.controller.inspectors import Inspectors, Owner
from pagecache_bpf.controller.load_templates import Asker, LoadTemplates
from pagecache_bpf.controller.node_hints import NodeHints, node_of
from pagecache_bpf.controller.processes import DiskDelays
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.ipc.peer import Peer
from pagecache_bpf.kernel import cgroups
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_key import reopen_descriptor
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.lending import Session
from pagecache_bpf.kernel.residency import CachedChunks
from pagecache_bpf.weights.models import NAME_BYTES

if TYPE_CHECKING:
    from pagecache_bpf.templates.template import Template

#: For what is being read of a load's files when it is over; the disk gives the rest soon.
_SETTLE_SECONDS = 10.0


@dataclass
class ClientLoad:
    """One load; times are of the monotonic clock, sizes in bytes."""

    id: str
    model: str
    peer: Peer
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
    held: dict[bytes, int] = field(default_factory=dict)  # descriptors of its files, by key
    session: Session | None = None  # lends its files to the module's policies
    resident_bytes: int = 0  # when it was closed
    resident_at_open: int = 0
    dropped: int = 0
    delay_at_open: int | None = None
    delay: int | None = None
    counted_at_open: dict[str, int] | None = None
    counted: dict[str, int] | None = None
    node: int | None = None
    template: str | None = None
    template_why: str = ""
    told: bool = False  # whether the client may know what of its files is cached

    @property
    def size(self) -> int:
        """Return the bytes of its files."""
        return sum(file.size for file in self.files)

    @property
    def owner(self) -> Owner:
        """Return whose load this is: the user, and whether that is root of this machine."""
        return self.peer.uid, self.peer.privileged


class LoadLedger:
    """Every open load.  Its methods may be called from any thread."""

    def __init__(
        self,
        engines: EngineControl,
        budgets: Budgets,
        inspectors: Inspectors,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Make an empty ledger.

        Args:
            engines: where policies are attached and files tagged.
            budgets: bounds of loads.
            inspectors: read headers and templates of clients.
            changed: called, holding no lock, when tags have been set or taken off.
        """
        self.engines = engines
        self._changed = changed
        self.budgets = budgets
        self.loads: dict[str, ClientLoad] = {}
        self.templates = LoadTemplates(engines, inspectors)
        self.inspectors = inspectors
        self.hints = NodeHints(engines)
        self.delays: DiskDelays | None = None
        self._lock = threading.RLock()
        self._users: dict[bytes, set[str]] = {}  # file -> loads that read it
        self._placed: dict[bytes, PlacedTag] = {}  # tags that were set for loads
        self._before: dict[bytes, CachedChunks] = {}  # what was cached before the first load of it

    def release_untagged(self) -> None:
        """Release the claims of root's models that have no tag left."""
        budgets = self.budgets
        if any(name.startswith(MODEL_CLAIM) for name in list(budgets.claims)):
            budgets.release_untagged(self.engines.tagged_models())

    def admit(
        self,
        files: Sequence[ClientFile],
        *,
        model: str,
        peer: Peer,
        budget: int | None,
        keep: bool,
        configured: bool = False,
        devices: Sequence[dict[str, Any]] = (),
        behind: bool = False,
    ) -> tuple[ClientLoad | None, Decision]:
        """Decide whether a load may run and, if so, claim its budget; place() has to follow.

        Args:
            files: what it wants to read.
            model: the name that the client gives, or that of the configured model.
            peer: the process that asks.
            budget: bytes that it wants to have in the cache at most; None: no bound of its own.
            keep: whether its pages stay when it is done.
            configured: whether the files are those of a model of the configuration.
            devices: what it is for, as the protocol has it.
            behind: whether others wait already, so that this one has to queue up.

        Returns:
            The load, None if it may not run yet, or at all; and what was decided.

        Raises:
            UsageError: the process has ended.
        """
        sizes = {file.key: file.size for file in files}
        room = peer.checked(headroom)
        owner = (peer.uid, peer.privileged)
        name = model if configured else label(model, owner)
        with self._lock:
            decision = self.budgets.decide(name, sizes, budget, room, owner)
            if behind and self.budgets.rule == "queue" and decision.kind != "refuse":
                decision = Decision("queue", 0, f"{decision.message}; others wait already")
            if decision.kind in ("queue", "refuse"):
                return None, decision
            bound = self.budgets.of_model(name, budget)
            load = ClientLoad(
                secrets.token_hex(8),
                name,
                peer,
                tuple({file.key: file for file in files}.values()),
                decision,
                decision.granted if decision.kind == "stream" else bound,
                tuple(devices),
                keep,
            )
            claim = Claim(name, peer.uid, sizes, decision.granted, owner=owner)
            self.budgets.claim(load.id, claim)
            self.loads[load.id] = load
            for key in sizes:
                self._users.setdefault(key, set()).add(load.id)
        return load, decision

    def place(
        self,
        load: ClientLoad,
        fds: Sequence[int],
        policy: str,
        *,
        knobs: Mapping[str, int],
        wanted: str,
        asker: Asker,
    ) -> None:
        """Put the load's files under a policy; one that cannot be had leaves it to the kernel.

        Args:
            load: as admit() made it.
            fds: open descriptors of load.files, in that order; they stay the caller's.
            policy: name of the policy that is to govern the files.
            knobs: its knobs, if it is not attached yet.
            wanted: the engine for it, if it is not attached yet.
            asker: whose files these are, and the template that came along.
        """
        for file, fd in zip(load.files, fds, strict=True):
            load.held[file.key] = reopen_descriptor(fd)
        load.resident_at_open = self._look(load)
        self.delays = self.delays or DiskDelays()
        load.delay_at_open = self._waited(load)
        # Whoever reads is served first and gets the template a moment later.  Only the maps of a
        # policy that is not attached yet have to be made for the template's size.
        template: Template | None = None
        attached = policy in self.engines.attached()
        if not attached:
            template = self._template(load, fds, policy, asker)
        try:
            sizes = self.templates.sizes(template)
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
        if engine == STRUCT_OPS and len(load.files) > 1:
            self._lend(load, fds)
        if governed:
            load.counted_at_open = self.engines.observed(load.model) or {}
            # What root has put under another policy stays there.
            load.policy = policy if policy in governed else governed[0]
            load.engine = self.engines.attached().get(load.policy)
            self._hint(load)
        self._changed()
        if load.policy == policy:
            if attached:
                template = self._template(load, fds, policy, asker)
            if template is not None:
                self._give(load, policy, engine, template)

    def _template(
        self, load: ClientLoad, fds: Sequence[int], policy: str, asker: Asker
    ) -> Template | None:
        """Return the I/O template of a load; None: the policy finds the order by itself."""
        if asker.text is None and self._join(load, policy):
            return None
        try:
            return self.templates.prepare(policy, load.files, fds, asker)
        except PagecacheError as error:
            # Another rank may have been faster.
            if asker.text is not None or not self._join(load, policy):
                load.template_why = str(error)
            return None

    def _join(self, load: ClientLoad, policy: str) -> bool:
        """Have a load share the template of an earlier one; False: there is none of its files."""
        load.template = self.templates.join(load.id, policy, load.model, load.files)
        if load.template is not None and load.closed is not None:
            self.templates.forget(load.id)
        return load.template is not None

    def _give(self, load: ClientLoad, policy: str, engine: str, template: Template) -> None:
        """Give the policy the load's template."""
        try:
            self.templates.give(load.id, policy, engine, load.model, template, load.files)
        except (PagecacheError, OSError) as error:
            load.template_why = str(error)
        else:
            load.template = template.source
            if load.closed is not None:
                self.templates.forget(load.id)

    def _lend(self, load: ClientLoad, fds: Sequence[int]) -> None:
        """Lend a load's files to the module's policy; without the lock, as servers may be asked."""
        session = Session()
        for fd in fds:
            session.lend(fd)
        with self._lock:
            if load.closed is None:
                load.session = session
                return
        session.close()

    def _hint(self, load: ClientLoad) -> None:
        """Tell the policy near which node the load's process wants its pages."""
        node = node_of(load.devices) if load.devices else None
        if load.engine is None or load.policy is None or node is None:
            return
        policy, engine = load.policy, load.engine
        with suppress(PagecacheError):
            if self.hints.give(load.id, load.peer.checked(int), policy, engine, node):
                load.node = node

    def end(self, load: ClientLoad, drop: bool = False) -> None:
        """End a load: its tags go, its claim is free.

        Args:
            load: the load; one that has ended is left alone.
            drop: whether the pages that nobody else uses go, too; what was cached before stays.
        """
        with self._lock:
            if load.closed is not None:
                return
            load.delay = self._delay(load)
            load.counted = self._counted(load)
            load.closed = time.monotonic()
            del self.loads[load.id]
            self.budgets.release(load.id)
            unused = []
            for file in load.files:
                users = self._users.get(file.key, set())
                users.discard(load.id)
                if users:
                    continue
                self._users.pop(file.key, None)
                placed = self._placed.get(file.key)
                if placed is not None:
                    self.engines.untag(placed)
                    del self._placed[file.key]
                unused.append(file)
        if load.session is not None:
            load.session.close()
        self.templates.forget(load.id)
        self.hints.forget(load.id, load.peer.pid)
        self._changed()
        if drop and load.told:
            self.engines.settle(_SETTLE_SECONDS)
            for file in unused:
                with suppress(OSError, KeyError):
                    if not self.readers(file.key):  # a load has come since
                        load.dropped += self._before[file.key].drop_others(load.held[file.key])
        with self._lock:
            for file in unused:
                if file.key not in self._users:
                    self._before.pop(file.key, None)
        load.resident_bytes = self._resident(load)
        held, load.held = load.held, {}
        for fd in held.values():
            os.close(fd)

    def _look(self, load: ClientLoad) -> int:
        """Count the cached bytes of a load's files before anything is read for it."""
        found = 0
        for file in load.files:
            with suppress(OSError):
                cached = CachedChunks.of(load.held[file.key])
                found += cached.resident
                with self._lock:
                    self._before.setdefault(file.key, cached)
        return found

    def readers(self, key: bytes) -> set[str]:
        """Return the ids of the loads that read a file.

        Args:
            key: what the file is (file_key.key_of).

        Returns:
            Ids; none if nobody reads it.
        """
        with self._lock:
            return set(self._users.get(key, ()))

    def tagged_by_root(self, files: Sequence[ClientFile]) -> set[bytes]:
        """Return which of these files have a tag of root's and are in no load, by key; no waiting.

        The file of a load is noted before it is tagged, and its tag until it is taken off.

        Args:
            files: the files in question.
        """
        tagged = set(self.engines.governors(files))
        return tagged - set(self._users) - set(self._placed)

    def placed(self) -> dict[bytes, PlacedTag]:
        """Return the tags that were set for loads, by file."""
        with self._lock:
            return dict(self._placed)

    def report(
        self, load: ClientLoad, counters: Mapping[str, dict[str, int]] | None = None
    ) -> dict[str, Any]:
        """Return a load as the protocol tells it.

        Args:
            load: a load that is open or over.
            counters: what the observer has counted by model; None: it is asked.
        """
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
            "keep": load.keep,
            "admission": load.decision.kind,
            "message": load.decision.message,
            "node": load.node,
            "seconds": (load.closed or time.monotonic()) - load.opened,
            "resident_at_open_bytes": load.resident_at_open if load.told else None,
            "resident_bytes": self._resident_now(load) if load.told else None,
            "dropped_bytes": load.dropped if load.told else None,
            "io_delay_ns": delay,
            "io_delay_why": "" if delay is not None else why or "the process has ended",
            "template": load.template,
            "template_why": load.template_why,
            "counters": load.counted if load.closed is not None else self._counted(load, counters),
        }

    def _waited(self, load: ClientLoad) -> int | None:
        """Nanoseconds that the load's process has waited for the disk; None: not known."""
        if self.delays is None:
            return None
        with suppress(PagecacheError):
            return load.peer.checked(self.delays.of)
        return None

    def _delay(self, load: ClientLoad) -> int | None:
        """Return by how much _waited() has grown since the load began; None: unknown."""
        now = self._waited(load)
        if now is None or load.delay_at_open is None:
            return None
        return now - load.delay_at_open

    def _resident_now(self, load: ClientLoad) -> int:
        """Return how many bytes of a load's files are cached, or were when it was closed."""
        return self._resident(load) if load.closed is None else load.resident_bytes

    @staticmethod
    def _resident(load: ClientLoad) -> int:
        """Count the cached bytes of a load's files without asking a file system, which may hang."""
        found = 0
        for file in load.files:
            with suppress(OSError, KeyError):
                found += cached_pages(load.held[file.key], 0, file.size) * PAGE_SIZE
        return found

    def _counted(
        self, load: ClientLoad, counters: Mapping[str, dict[str, int]] | None = None
    ) -> dict[str, int] | None:
        """Return what the observer has counted for the model since the load began."""
        now = self.engines.observed(load.model) if counters is None else counters.get(load.model)
        if now is None:
            return None
        before = load.counted_at_open or {}
        return {name: value - before.get(name, 0) for name, value in now.items()}


def label(model: str, owner: Owner) -> str:
    """Return the name under which a client's model is counted, tagged and given templates.

    Only root's names are plain: those of others carry their user, so that nobody's load is counted
    into, reads or replaces what is root's or another user's.

    Args:
        model: the name that the client gives.
        owner: its user, and whether it is root of this machine.
    """
    uid, privileged = owner
    if privileged:
        return model
    suffix = f"@{uid}"
    return model[: NAME_BYTES - len(suffix)] + suffix


def headroom(pid: int) -> int | None:
    """Return how much a process's memory cgroup, and the machine, have room for.

    Args:
        pid: the process.

    Returns:
        Bytes; None: there is no bound.
    """
    found = [cgroups.host_memory().get("MemAvailable")]
    with suppress(PagecacheError):
        found.append(cgroups.of_process(pid).headroom)
    return min((room for room in found if room is not None), default=None)
