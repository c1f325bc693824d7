# SPDX-License-Identifier: Apache-2.0
"""Observer: what happens to files in the page cache, counted by BPF programs and read here.

It tells the programs which files to count for (tag), reads their counters by model and by process
(hits, misses, bytes read ahead, stalls, evictions), and receives how far each process has read.
Which processes read, and which of them have ended, is kept in observer/consumers.py; the programs
are loaded by observer/programs.py.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError
from pagecache_bpf.kernel import abi, file_identity, libbpf
from pagecache_bpf.kernel.abi import OBSERVED
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_key import key_of, path_of, told_key
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.inode_filter import InodeBits
from pagecache_bpf.kernel.numa import nodes
from pagecache_bpf.kernel.own_processes import OwnProcesses
from pagecache_bpf.kernel.process_tree import is_alive
from pagecache_bpf.observer.consumers import Consumer, Consumers, by_process, sums
from pagecache_bpf.observer.count_maps import BITS_PAGES
from pagecache_bpf.observer.counted_file import CountedFile
from pagecache_bpf.observer.programs import ACCESSES, FAULTS, SWITCH, Programs, RecordingGrid
from pagecache_bpf.observer.residency_blocks import HUGE_PAGES, may_hold_huge_folio, resident_blocks

if TYPE_CHECKING:
    from pagecache_bpf.observer.bcc import BccPrograms

_SEED_TRIES = 5
#: HUGE_FOLIO of bpf/include/observer.bpf.h, and that there is one.
_HUGE_FOLIO = _ONE = (1).to_bytes(4, "little")
_LOOK_SECONDS = 10.0  # how long what nobody reads may be gone unnoticed

# Where an observed file's value has the pages that were added and removed.
_MOVED = slice(
    abi.pagecache_observed_file.added_pages.offset,  # type: ignore[attr-defined]
    abi.pagecache_observed_file.folio_pages.offset,  # type: ignore[attr-defined]
)

#: What is counted where nothing tells of reads and faults.
_COUNTED_DEGRADED = frozenset(
    {"added_bytes", "requested_bytes", "prefetched_bytes", "removed_bytes"}
    | {counter.name for counter in OBSERVED if counter.name.startswith("evicted_")}
)
_STALLS = frozenset({"read_stall_ns", "mmap_stall_ns"})

Move = abi.pagecache_observed_move


@dataclass
class _Model:
    number: int
    policy: str | None = None
    engine: str | None = None
    files: dict[bytes, CountedFile] = field(default_factory=dict)
    since_ns: int = 0  # when its first file was tagged, after it had none
    base: dict[int, list[int]] = field(default_factory=dict)  # what was counted then, by process


class Observer:
    """Counts what the readers of tagged files find in the page cache.  A context manager.

    Args:
        moves: "off"; "limited", some cursor moves of each file; "all" of them, for recording.
        without: events to do without, as if nothing told of them.
        backend: "libbpf", or "bcc" for kernels without BTF; None: $PAGECACHE_BPF_BACKEND or libbpf.
        log_dir: where the verifier's log goes if it refuses; None: the run directory.
        grid: how finely a recording is to tell events apart; None: nothing is recorded.

    Raises:
        UnsupportedError: there is no tracepoint, no libbpf or no BCC.
        PrivilegeError: this is not root.
    """

    def __init__(
        self,
        moves: str = "off",
        without: Collection[str] = (),
        backend: str | None = None,
        log_dir: Path | None = None,
        grid: RecordingGrid | None = None,
    ) -> None:
        if os.geteuid() != 0:
            raise PrivilegeError("only root can observe", f"this is user {os.geteuid()}")
        self._models: dict[str, _Model] = {}
        self._files: dict[bytes, CountedFile] = {}
        self._slots = 0
        self._types: frozenset[str] | None = file_identity.module_types()
        told = ("off", "limited", "all").index(moves)
        self._programs = _start(backend, told, without, log_dir, grid)
        if self._programs.backend != Programs.backend:
            self._types = None
        self._maps = self._programs.maps
        self._consumers = Consumers(self._maps)
        self._inodes = InodeBits(self._maps["inode_bits"])
        self._ring: libbpf.RingBuffer | None = None
        self._own = OwnProcesses(self._maps["own_processes"], self._maps["own_changes"])
        self.own(os.getpid())

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach the programs and forget everything."""
        if self._ring:
            self._ring.close()
            self._ring = None
        for file in self._files.values():
            file.let_go()
        self._programs.close()

    @property
    def missing(self) -> list[str]:
        """Tracepoints that the kernel lacks, or refuses."""
        return sorted(self._programs.missing)

    @property
    def level(self) -> str:
        """What can be counted: "full" or "degraded"."""
        return "degraded" if set(self._programs.missing) - FAULTS else "full"

    @property
    def uncounted(self) -> list[str]:
        """Counters that stay 0 for want of events."""
        missing = set(self._programs.missing)
        names = [counter.name for counter in OBSERVED]
        if missing & ACCESSES:
            return [name for name in names if name not in _COUNTED_DEGRADED]
        return [name for name in names if SWITCH in missing and name in _STALLS]

    def own(self, pid: int) -> None:
        """Take what a process reads as prefetched, and as no access of a reader's.

        Args:
            pid: the process, of this project.
        """
        self._own.add(pid)

    # --- files ---

    def tag(
        self,
        fd: int,
        model: str,
        *,
        path: str | None = None,
        policy: str | None = None,
        engine: str | None = None,
    ) -> None:
        """Observe an open file, as a part of a model; tagging it again moves it there.

        Args:
            fd: the open file; it may be closed afterwards.
            model: the model's name.
            path: leads to the file again, for its residency; by default what /proc says of `fd`.
            policy: by what the model is governed; only handed on to snapshot().
            engine: the engine of that policy; only handed on to snapshot().

        Raises:
            UsageError: it is nothing that can be cached, or there are too many files.
            UnsupportedError: the programs would not know what the kernel tells of it.
            OSError: the system refused to look at it.
        """
        shown = path or path_of(fd)
        key = told_key(fd, self._types, f"{shown} is not observed")
        self.untag(key)
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = _Model(len(self._models) + 1)
            first = abi.pagecache_observed_key(model=known.number)
            self._maps["observed"].update(
                bytes(first), bytes(ctypes.sizeof(abi.pagecache_observed_value))
            )
        if not known.files:
            known.since_ns = time.time_ns()
            known.base = by_process(self._consumers.by_model().get(known.number, []))
        known.policy, known.engine = policy or known.policy, engine or known.engine
        self._slots += 1
        status = os.fstat(fd)
        blocks = -(-status.st_size // (PAGE_SIZE * BITS_PAGES))
        here = (status.st_dev, status.st_ino)
        held = os.dup(fd) if file_identity.is_served(fd) else -1
        file = CountedFile(key, self._slots, model, shown, blocks, here, held)
        self._inodes.add(key)
        try:
            self._seed(fd, file, known.number)
        except OSError as error:
            self._forget(file)
            raise UsageError(f"{shown} is not observed", error.strerror or str(error)) from error
        self._files[key] = known.files[key] = file

    def untag(self, key: bytes) -> bool:
        """Observe a file no more.

        Args:
            key: the file's key, of kernel.file_key.key_of().

        Returns:
            False if it was not observed.
        """
        file = self._files.pop(key, None)
        if file is None:
            return False
        del self._models[file.model].files[key]
        self._forget(file)
        return True

    def untag_fd(self, fd: int) -> bool:
        """Observe an open file no more.

        Args:
            fd: the open file.

        Returns:
            False if it was not observed.
        """
        return self.untag(key_of(fd))

    def _seed(self, fd: int, file: CountedFile, model: int) -> None:
        """Tell the programs what is resident; once more if it changed before they knew."""
        files, bits = self._maps["observed_files"], self._maps["page_bits"]
        size = os.fstat(fd).st_size  # squashfs fills whole blocks, with pages after the end
        for _ in range(_SEED_TRIES):
            resident, huge = 0, False
            for block, value in resident_blocks(fd):
                bits.update(_bits_key(file.slot, block), value)
                huge = huge or may_hold_huge_folio(value)
                resident += int.from_bytes(value[: BITS_PAGES // 8], "little").bit_count()
            if huge:
                self._maps["huge_mappings"].update(_HUGE_FOLIO, _ONE)
            folio_pages = HUGE_PAGES if resident else 1  # what is there may lie in any
            value = bytes(
                abi.pagecache_observed_file(
                    model=model, slot=file.slot, resident_pages=resident, folio_pages=folio_pages
                )
            )
            files.update(file.key, value)
            known = self._file_value(file)
            if known is None or known.resident_pages == cached_pages(fd, 0, size):
                return
            files.delete(file.key)
            self._delete_bits(file)

    def _file_value(self, file: CountedFile) -> abi.pagecache_observed_file | None:
        raw = self._maps["observed_files"].lookup(file.key)
        return abi.pagecache_observed_file.from_buffer_copy(raw) if raw else None

    def _forget(self, file: CountedFile) -> None:
        file.let_go()
        with suppress(OSError):
            self._maps["observed_files"].delete(file.key)
        self._delete_bits(file)
        self._consumers.retire(file.slot)
        self._inodes.remove(file.key)

    def _delete_bits(self, file: CountedFile) -> None:
        for block in range(file.blocks):
            self._maps["page_bits"].delete(_bits_key(file.slot, block))

    # --- numbers ---

    def counters(self) -> dict[str, dict[str, int]]:
        """Return what was counted for each model, without looking at its files.

        Returns:
            Counters by model; they are those of snapshot(), at a small part of its cost.
        """
        consumers = self._consumers.by_model()
        uncounted = set(self.uncounted)
        return {
            name: _named(
                sums(found.counters for found in consumers.get(model.number, [])), uncounted
            )
            for name, model in list(self._models.items())
        }

    def snapshot(self) -> dict[str, Any]:
        """Read everything that is counted, as it is now.

        Returns:
            A dictionary in the shape that pagecache_bpf.observer describes; counters are sums since
            the file was tagged.
        """
        consumers = self._consumers.by_model()
        raw = self._maps["observer_state"].lookup(bytes(4))
        state = abi.pagecache_observer_state.from_buffer_copy(raw or b"")
        values = self._maps["observed_files"].items()
        return {
            "time_ns": time.time_ns(),
            "level": self.level,
            "missing": self.missing,
            "uncounted": self.uncounted,
            "backend": self._programs.backend,
            "lost_events": state.lost_moves
            + state.lost_pages
            + state.lost_consumers
            + state.lost_records,
            "models": [
                self._model(name, model, consumers.get(model.number, []), values)
                for name, model in self._models.items()
            ],
        }

    def _model(
        self, name: str, model: _Model, consumers: list[Consumer], values: dict[bytes, bytes]
    ) -> dict[str, Any]:
        size = resident = gone = 0
        for file in list(model.files.values()):
            self._look(file, values.get(file.key))
            gone += file.size is None
            size += file.size or 0
            resident += file.resident_bytes
        uncounted = set(self.uncounted)
        named = partial(_named, uncounted=uncounted)
        return {
            "model": name,
            "policy": model.policy,
            "engine": model.engine,
            "files": len(model.files),
            "gone": gone,
            "bytes": size,
            "resident_bytes": resident,
            "resident_by_node": {"0": resident} if len(nodes()) <= 1 else "unknown",
            "since_ns": model.since_ns,
            "counters_before": named(sums(model.base.values())),
            "counters": named(sums(consumer.counters for consumer in consumers)),
            "consumers": [
                {
                    "tgid": consumer.tgid,
                    "comm": consumer.comm,
                    "alive": is_alive(consumer.tgid),
                    "counters_before": named(model.base.get(consumer.tgid, [0] * len(OBSERVED))),
                    "counters": named(consumer.counters),
                }
                for consumer in sorted(consumers, key=lambda consumer: consumer.tgid)
                if consumer.tgid
            ],
        }

    def _look(self, file: CountedFile, raw: bytes | None) -> None:
        """Size and residency of a file, if something came or went, or some time has passed."""
        moved = file.moved or b""
        if raw is not None:
            moved = raw[_MOVED]
        now = time.monotonic()
        if moved == file.moved and now < file.looked + _LOOK_SECONDS:
            return
        file.size = file.size_now()
        file.looked = now
        if file.size is None:
            file.resident_bytes = 0
        elif moved != file.moved:
            with suppress(OSError):
                try:
                    fd = file.open()
                except FileNotFoundError:  # as after a copy to overlayfs' upper layer
                    file.size, file.resident_bytes = None, 0
                    return
                try:
                    file.resident_bytes = cached_pages(fd) * PAGE_SIZE
                finally:
                    os.close(fd)
        file.moved = moved

    # --- recording ---

    def slot_of(self, fd: int) -> int:
        """Return the number by which a recording knows an observed file.

        Args:
            fd: the open file.

        Returns:
            The number; no other file gets it while this observer is open.

        Raises:
            UsageError: it is not observed.
        """
        file = self._files.get(key_of(fd))
        if file is None:
            raise UsageError("the file is not observed", f"descriptor {fd} was not tagged")
        return file.slot

    def take_recorded(self, before_tick: int) -> dict[tuple[int, int, int, int], list[int]]:
        """Take away what was recorded in the intervals that are over.

        Args:
            before_tick: number of the first interval that is left, because it is not over yet.

        Returns:
            By (slot of the file, cell, interval, process): the counters in the order of
            kernel.abi.RECORDED.
        """
        recorded = self._maps["recorded"]
        found = {}
        for raw, counters in recorded.items().items():
            key = abi.pagecache_recorded_key.from_buffer_copy(raw)
            if key.tick < before_tick:
                recorded.delete(raw)
                value = abi.pagecache_recorded_value.from_buffer_copy(counters)
                found[key.slot, key.cell, key.tick, key.tgid] = list(value.counters)
        return found

    # --- cursors ---

    def poll(self, receive: Callable[[Move], None], milliseconds: int = 0) -> int:
        """Hand over moves of readers' cursors, waiting for the first of them.

        Args:
            receive: called with each move, in this thread; it has to be the same at every call.
            milliseconds: to wait at most; 0: not at all.

        Returns:
            How many moves there were.

        Raises:
            PagecacheError: the observer was opened without moves, or BCC runs it, which has none.
        """
        if self._ring is None:
            if self._programs.ring_fd < 0:
                raise PagecacheError("no cursor moves are told", "this backend has no ring buffer")
            self._ring = libbpf.RingBuffer(
                self._programs.ring_fd, lambda record: receive(Move.from_buffer_copy(record))
            )
        with suppress(InterruptedError):
            return self._ring.poll(milliseconds)
        return 0


def _start(
    backend: str | None,
    moves: int,
    without: Collection[str],
    log_dir: Path | None,
    grid: RecordingGrid | None,
) -> Programs | BccPrograms:
    backend = backend or os.environ.get("PAGECACHE_BPF_BACKEND") or "libbpf"
    if backend == "libbpf":
        return Programs(moves, without, log_dir, grid)
    if backend != "bcc":
        raise UsageError(f"there is no backend {backend}", "it is libbpf or bcc")
    if grid is not None:
        raise UnsupportedError("no load can be recorded", "the backend bcc does not record")
    from pagecache_bpf.observer.bcc import BccPrograms

    return BccPrograms(moves, without, log_dir)


def _bits_key(slot: int, block: int) -> bytes:
    return slot.to_bytes(4, "little") + block.to_bytes(4, "little")


__all__ = ["Move", "Observer"]


def _named(counters: list[int], uncounted: Collection[str]) -> dict[str, int]:
    """Counters by name; those that this kernel cannot count are 0."""
    return {
        counter.name: 0 if counter.name in uncounted else value
        for counter, value in zip(OBSERVED, counters, strict=True)
    }
