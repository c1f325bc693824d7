# SPDX-License-Identifier: Apache-2.0
"""Runs one policy on tracepoints, in this process; it ends with the process.

Nothing is pinned and no setting is changed: a process that is killed takes its programs, its
maps and its queue along, and readers go on at the kernel's own speed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pagecache_bpf.agent.hint_access import Hints
from pagecache_bpf.agent.missing_parts import parts_of
from pagecache_bpf.agent.pressure import Ask, PressureWatch, ask_all
from pagecache_bpf.agent.queue_depth import DEFAULT_DEPTH, LEAST_DEPTH, Depths, Tuner
from pagecache_bpf.agent.read_threads import Extent, Source
from pagecache_bpf.agent.readers import Readers
from pagecache_bpf.agent.shared_state import dropped_templates, read_state
from pagecache_bpf.agent.tagged_files import FileTag, Sequence
from pagecache_bpf.agent.unsupported import check_heard, check_kernel, not_honored
from pagecache_bpf.agent.workers import Pools
from pagecache_bpf.errors import PolicyRejected, UsageError
from pagecache_bpf.kernel import (
    abi,
    bpf_object,
    event_sources,
    file_identity,
    libbpf,
    pid_namespace,
)
from pagecache_bpf.kernel.abi import COUNTERS, Hook, RequestKind
from pagecache_bpf.kernel.bpf_maps import BpfMap, map_id
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_key import reopen, reopen_descriptor, told_key
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.inode_filter import InodeBits
from pagecache_bpf.kernel.own_processes import OwnProcesses
from pagecache_bpf.policy.catalog import PolicyInfo
from pagecache_bpf.policy.objects import enlarge_maps, set_knobs

MAX_INFLIGHT_BYTES = 256 << 20
#: The readers' memory is looked at so often; a window of 0 opens again only then.
REFRESH_SECONDS = 0.5


class Agent:
    """A policy at work.  A context manager: leaving it ends the policy.

    Args:
        info: what is known of the policy.
        obj: its object file, compiled for this engine.
        knobs: settings by name; what is not named has its default.
        log_dir: where the verifier's log goes if it refuses; None: the run directory.
        sizes: elements that maps must have room for, by name; None: as compiled.
        started: called with each process that will read for it, this one too.
        begin: False only loads it, which takes most of the time: begin() has it work.

    Raises:
        PolicyRejected: the verifier refuses it, or its init fails.
        UnsupportedError: nothing would call a hook of it, or there is no libbpf.
        UsageError: a knob is wrong, or the object is damaged.
    """

    def __init__(
        self,
        info: PolicyInfo,
        obj: Path,
        knobs: Mapping[str, int] | None = None,
        log_dir: Path | None = None,
        sizes: Mapping[str, int] | None = None,
        started: Callable[[int], None] = lambda pid: None,
        begin: bool = True,
    ) -> None:
        self.info = info
        self._tell_started = started
        self.tags: dict[bytes, FileTag] = {}
        self._sequence = Sequence()
        self._tag_of: dict[Source, FileTag] = {}
        self.knobs = {knob.name: (knobs or {}).get(knob.name, knob.default) for knob in info.knobs}
        self.exit: tuple[int, str, str] | None = None  # code, message, hook
        self.exit_noted = False
        self.missing: list[str] = []
        self.events: dict[str, str] = {}
        self._models: dict[str, int] = {}
        self._lock = threading.Lock()
        self._types = file_identity.module_types()
        self._object = self._load(obj, knobs or {}, sizes or {}, log_dir)
        self._maps = {found.name: BpfMap(found.fd) for found in self._object.maps()}
        self._inodes = InodeBits(self._maps["inode_bits"])
        self.hints = Hints(self._object.btf(), self._maps)
        self._orders = abi.pagecache_agent_orders(max_inflight=MAX_INFLIGHT_BYTES // PAGE_SIZE)
        self._give_orders()
        self._links: list[libbpf.Link] = []
        self._ring = libbpf.RingBuffer(self._maps["requests"].fd, self._receive)
        self._own = OwnProcesses(self._maps["own"])
        self.own(os.getpid())
        self._refused_bytes = self._cached_bytes = 0
        self._refreshed = time.monotonic()
        self._depths = Depths()
        self._tuners: dict[str, Tuner] = {}
        self._readers = Readers(PAGE_SIZE, self._bound)
        self._pools = Pools(self._settled, self._depth_of, self.own)
        self._pressure: PressureWatch | None = None
        self._given = 0  # pages of drop requests
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        if begin:
            try:
                self.begin()
            except BaseException:
                self.close()
                raise

    def begin(self) -> None:
        """Run the policy's init, attach its programs, and serve what they ask for.

        Raises:
            PolicyRejected: its init fails, or ends the policy.
            UnsupportedError: nothing would call a hook of it.
        """
        self._initialize()
        self._attach()
        if "pressure" in self.info.hooks:
            self._pressure = PressureWatch()
        self._thread.start()

    def fits(self, knobs: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
        """Tell whether the policy was loaded with these knobs and has room for so many elements.

        Args:
            knobs: values by name; the others are the defaults.
            sizes: elements by the name of the map.

        Returns:
            False if it has to be loaded anew.
        """
        wanted = {knob.name: knobs.get(knob.name, knob.default) for knob in self.info.knobs}
        found = {name: opened.entries for name, opened in self._maps.items()}
        return wanted == self.knobs and all(
            found.get(name, room) >= room for name, room in sizes.items()
        )

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach the programs, finish what is being read, forget the rest."""
        for link in self._links:
            link.close()
        self._links = []
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._pressure:
            self._pressure.close()
        self._pools.stop()
        for tag in self.tags.values():
            tag.let_go()
        for device, tuner in self._tuners.items():
            if tuner.learned:
                self._depths.learned(device, tuner.depth, int(tuner.bytes_per_second))
        self._ring.close()
        self._object.close()

    def tag(self, fd: int, model: str, path: str, hold: bool = False) -> FileTag:
        """Govern an open file.

        Args:
            fd: the file, open for reading; it stays the caller's.
            model: name of the model that the file belongs to.
            path: where the file is; for people, and to open it again.
            hold: keep a descriptor of it until it is untagged, instead of opening it by its path
                for each work.  For files of others, who could change what the path leads to; it is
                done anyway where opening asks a server, which may not answer.

        Returns:
            The tag, as it stands in `tags` until it is let go.

        Raises:
            UsageError: it cannot be opened by that path.
            UnsupportedError: the programs would not know what the kernel tells of it.
        """
        key = told_key(fd, self._types, f"{path} was not tagged")
        keep = hold or file_identity.is_served(fd)
        held = reopen_descriptor(fd) if keep else -1
        source = Source(lambda: os.dup(held) if keep else reopen(key, path))
        try:
            source.acquire()
        except OSError as error:
            raise UsageError(f"{path} was not tagged", error.strerror or str(error)) from error
        source.release()
        number = self._models.setdefault(model, len(self._models) + 1)
        tag = FileTag.of(key, model, number, path, source, held)
        if tag.device not in self._tuners:
            # A file of somebody else's is not read here: its file system may not answer.
            found = self._depths.kept(fd) if hold else self._depths.of(fd)
            self._tuners[tag.device] = Tuner(max(found.depth, DEFAULT_DEPTH), LEAST_DEPTH)
        tag.device_mib_s = self._depths.kept(fd).bytes_per_second >> 20
        if key not in self.tags:
            self._inodes.add(key)
        else:
            self.tags[key].let_go()
        self.tags[key] = tag
        self._tag_of[source] = tag
        before, after = self._sequence.add(tag)
        tag.next = after
        with self._lock:
            self._orders.governed += cached_pages(fd)
            self._give_orders()
        self._maps["tags"].update(key, tag.record())
        self._follow(before, tag)
        return tag

    def _follow(self, tag: FileTag | None, after: FileTag | None) -> None:
        """Another file comes after one now."""
        if tag is not None:
            tag.next = after
            with suppress(OSError):
                self._maps["tags"].update(tag.key, tag.record(), existing=True)

    def untag(self, key: bytes) -> bool:
        """Govern a file no more; reads of it that are queued are cancelled.

        Args:
            key: the file's key, of kernel.file_key.key_of().

        Returns:
            False if it was not governed.
        """
        tag = self.tags.pop(key, None)
        if tag is None:
            return False
        self._tag_of.pop(tag.source, None)
        self._follow(*self._sequence.remove(tag))
        self._maps["tags"].delete(key)
        self._inodes.remove(key)
        tag.source.over = True
        self._pools.cancel(None, tag.source)
        with self._lock:
            self._orders.governed -= tag.resident_pages()
            self._give_orders()
        tag.let_go()
        return True

    def settle(self, seconds: float) -> bool:
        """Return whether what is being read of files that were let go has ended.

        Args:
            seconds: to wait at most.
        """
        return self._pools.settle(seconds)

    def counters(self) -> dict[str, int]:
        """Return each counter of the policy by its name, in the unit of kernel.abi.COUNTERS."""
        counters = self._maps["counters"]
        values = {counter.name: counters.sum_per_cpu(at) for at, counter in enumerate(COUNTERS)}
        values["prefetch_issued_bytes"] = self._pools.totals.read_bytes
        values["prefetch_cancelled_bytes"] = self._pools.totals.cancelled_bytes
        values["drop_bytes"] = self._pools.totals.dropped_bytes
        return values

    def numbers(self) -> dict[str, Any]:
        """Return what `status` shows of this policy: pages, counters, errors, workers."""
        state = self.state
        return {
            "governed_pages": max(0, state.governed + self._orders.governed),
            "inflight_pages": max(0, state.asked - self._orders.done),
            "lost": state.lost,
            "counters": self.counters(),
            "errors": dict(self._pools.totals.by_errno),
            "refused_bytes": self._refused_bytes,
            "already_cached_bytes": self._cached_bytes,
            "workers": self._pools.pids(),
            "depths": {device: tuner.depth for device, tuner in self._tuners.items()},
            "not_honored": self.not_honored(),
        }

    def not_honored(self) -> list[str]:
        """Return what a policy may ask for and is not done here, or turned out not to work."""
        found = not_honored(self.info.hooks)
        if self._pressure:
            found += self._pressure.missing
        if self._readers.blind:
            found.append(
                "the readers' memory cgroups: the agent is in a PID namespace of its own, so what "
                "is read ahead is charged to the agent's"
            )
        for code, times in self._pools.charged.refused.items():
            found.append(
                f"charging a reader's memory cgroup: {times} of {self._pools.charged.moves} "
                f"workers could not be moved there ({os.strerror(code)})"
            )
        return found

    def map_ids(self) -> dict[str, int]:
        """Return the kernel's number of each map, by which root can open it."""
        return {name: map_id(opened.fd) for name, opened in self._maps.items()}

    def dropped_templates(self) -> list[str]:
        """Return models whose I/O template the policy has given up, as it was wrong too often."""
        return dropped_templates(self._maps)

    @property
    def state(self) -> abi.pagecache_agent_state:
        """What the programs tell this process."""
        return read_state(self._maps)

    # --- the parts ---

    def _load(
        self, obj: Path, knobs: Mapping[str, int], sizes: Mapping[str, int], log_dir: Path | None
    ) -> libbpf.Object:
        def prepare(opened: libbpf.Object) -> None:
            event_sources.choose(opened)
            set_knobs(opened, knobs)
            enlarge_maps(opened, sizes)
            opened.set_constants(
                {
                    "agent_page_shift": PAGE_SIZE.bit_length() - 1,
                    **pid_namespace.constants("agent"),
                }
            )

        name = self.info.name
        try:
            return bpf_object.load(obj, name, prepare, f"{name}-agent-load.log", log_dir)
        except bpf_object.ProgramsRefused as error:
            # An old kernel's verifier may be what refuses; this is then what matters.
            check_kernel(name)
            check_heard(name, self.info.hooks, event_sources.sources_here())
            raise PolicyRejected(
                f"the kernel refused to load the policy {name}",
                error.why,
                error.fix,
                log_path=error.log_path,
            ) from error

    def _initialize(self) -> None:
        """Run the policy's init.  Raises PolicyRejected if it fails or ends the policy."""
        what = f"the policy {self.info.name} was not attached"
        for program in self._object.programs():
            if program.name != "agent_init":
                continue
            code = program.run()
            self._ring.poll(0)
            if self.exit is not None:
                code, message, _ = self.exit
                raise PolicyRejected(what, f"the policy ended itself in init: {message} ({code})")
            if code < 0:
                raise PolicyRejected(what, f"its init failed: {os.strerror(-code)}")

    def _attach(self) -> None:
        """Attach the programs.  Raises UnsupportedError if nothing would call one of the hooks."""
        self.events, self.missing = event_sources.attach(self._object.programs(), self._links)
        check_heard(self.info.name, self.info.hooks, self.events)

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(InterruptedError):
                self._ring.poll(200)
            if time.monotonic() >= self._refreshed + REFRESH_SECONDS:
                self._refreshed = time.monotonic()
                self._readers.refresh()
                self._own.prune()
            for short in self._pressure.check() if self._pressure else ():
                ask_all(short, PAGE_SIZE, [self._asker(tag) for tag in list(self.tags.values())])

    def _asker(self, tag: FileTag) -> Ask:
        """Asks the policy's hook `pressure` about a file; in the agent's loop only."""
        program = self._object.program("agent_pressure")

        def ask(pages: int, cgroup_id: int, turn: int) -> int:
            resident = tag.resident_pages()
            if not resident or self.exit is not None:
                return 0
            before, size = self._given, tag.size_bytes()
            arguments = abi.pagecache_agent_pressure(
                file=abi.pagecache_file_key.from_buffer_copy(tag.key),
                want=abi.pagecache_pressure(
                    pages=pages, cgroup_id=cgroup_id, round=turn, files=len(self.tags)
                ),
                file_pages=-(-size // PAGE_SIZE),
                resident_pages=resident,
            )
            program.run(arguments)
            self._ring.poll(0)
            return min(self._given - before, resident)

        return ask

    def own(self, pid: int) -> None:
        """Take what a process reads as prefetched, and as no access of a reader's.

        Args:
            pid: the process.
        """
        self._own.add(pid)
        self._tell_started(pid)

    def hint(self, tgid: int, node: int | None) -> None:
        """Tell the policy on which NUMA node a process wants its pages.

        Args:
            tgid: the process.
            node: the node; None: it is not known, or the process wants it no more.
        """
        self.hints.set_node(tgid, node)

    def _bound(self, tgid: int, pages: int | None) -> None:
        """Tell the programs how many pages may be read ahead of a reader; None: it is gone."""
        key = tgid.to_bytes(4, sys.byteorder)
        with suppress(OSError):
            if pages is None:
                self._maps["windows"].delete(key)
            else:
                self._maps["windows"].update(key, pages.to_bytes(8, sys.byteorder))

    def _depth_of(self, device: str) -> int:
        tuner = self._tuners.get(device)
        return tuner.depth if tuner else DEFAULT_DEPTH

    def _receive(self, record: bytes) -> None:
        request = abi.pagecache_request.from_buffer_copy(record)
        key = bytes(request.file)
        tag = self.tags.get(key)
        if request.kind == RequestKind.EXIT:
            message = request.message.decode(errors="replace")
            self.exit = (request.code, message, Hook(request.start).name.lower())
        elif request.kind == RequestKind.CANCEL:
            self._pools.cancel(request.tgid, tag.source if tag else None)
        elif tag is None:
            if request.kind == RequestKind.PREFETCH:
                self._finish(request.nr)
        else:
            dropping = request.kind == RequestKind.DROP
            if dropping:
                self._given += request.nr
            if self._pressure:
                self._pressure.watch_process(request.tgid)
            extent = Extent(
                tag.source,
                request.start * PAGE_SIZE,
                request.nr * PAGE_SIZE,
                request.tgid,
                request.node,
                dropping,
            )
            if dropping:
                self._pools.submit(extent)
            else:
                self._prefetch(tag, extent)

    def _prefetch(self, tag: FileTag, extent: Extent) -> None:
        """Read what is not cached and fits into the reader's memory; the rest is settled."""
        with parts_of(extent, self._readers.get(extent.owner).window) as parts:
            self._refused_bytes += parts.refused
            self._cached_bytes += parts.cached
            if parts.cached and not parts.read:
                self._tell_done(tag, extent.start + parts.cached)
            if parts.refused or parts.cached:
                self._finish((parts.refused + parts.cached) // PAGE_SIZE)
            for part in parts.read:
                place = self._readers.place(extent.owner, extent.node, tag.device)
                self._pools.submit(part, place)

    def _tell_done(self, tag: FileTag, end: int) -> None:
        """Tell the programs up to where the file has been read ahead."""
        tag.source.done = max(tag.source.done, end)
        with suppress(OSError):
            self._maps["tags"].update(tag.key, tag.record(), existing=True)

    def _settled(self, extent: Extent, start: int, length: int) -> None:
        if extent.drop:
            return
        tag = self._tag_of.get(extent.file)
        if tag is not None:
            self._tell_done(tag, start + length)
            tuner = self._tuners[tag.device]
            if tuner.observe(length, self._pools.queued_bytes(tag.device), time.monotonic()):
                self._pools.set_depth(tag.device)
        self._finish(-(-length // PAGE_SIZE))

    def _finish(self, pages: int) -> None:
        with self._lock:
            self._orders.done += pages
            self._give_orders()

    def _give_orders(self) -> None:
        self._maps["orders"].update(bytes(4), bytes(self._orders))
