# SPDX-License-Identifier: Apache-2.0
"""Runs a policy's own C against the model of the page cache in bpf/include/simulate_cache.h."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from pagecache_bpf.errors import PagecacheError, PolicyRejected, UsageError
from pagecache_bpf.policy.catalog import PolicyInfo
from pagecache_bpf.policy.compiler import compile_simulation
from pagecache_bpf.policy.hint_maps import HintMap, find_map, gauges_of, maps_of, resolve
from pagecache_bpf.simulate import TOTALS
from pagecache_bpf.simulate.optimum import optimum
from pagecache_bpf.simulate.trace import Access, HintEvent, Trace

KERNEL, LRU = 0, 1
MAX_ACCESSES = 2_000_000
SMALLEST_UNIT = 4096
_KIND_READ = 6  # enum pagecache_kind
_copies = count()  # of this process


class Event(ctypes.Structure):
    """struct sim_event."""

    _fields_ = [
        ("time_ns", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
        ("file", ctypes.c_uint32),
        ("tgid", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class _Totals(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in TOTALS]


@dataclass(frozen=True)
class Result:
    """What came of one replay; ended: how the policy ended itself, None if it did not."""

    name: str
    totals: dict[str, int]
    gauges: dict[str, int]
    ended: str | None = None

    @property
    def hit_bytes(self) -> int:
        """Bytes found in the cache since an earlier use."""
        return self.totals["hit_bytes"]

    @property
    def reread_bytes(self) -> int:
        """Bytes read from the device that had been read before."""
        return self.totals["reread_bytes"]


def unit_for(trace: Trace) -> int:
    """Choose the size of a page, so that the replay of a long trace stays short.

    Args:
        trace: what is going to be replayed.

    Returns:
        Bytes: the smallest power of 2, from SMALLEST_UNIT on, with at most MAX_ACCESSES accesses.
    """
    wanted = sum(access.length for access in trace.accesses)
    unit = SMALLEST_UNIT
    while wanted // unit > MAX_ACCESSES:
        unit *= 2
    return unit


class Simulator:
    """A policy compiled for this process.

    Args:
        info: the policy; its source has to be at hand.

    Raises:
        UsageError: the source is not at hand.
        CompileError: it is wrong.
        UnsupportedError: there is no clang.
        PagecacheError: the policy uses what the simulation does not have.
    """

    def __init__(self, info: PolicyInfo) -> None:
        if info.source is None:
            raise UsageError(
                f"the policy {info.name} cannot be simulated",
                "its source is not at hand",
                "Give its .bpf.c",
            )
        self.info = info
        self._object = compile_simulation(info.source)

    def _fresh(self) -> ctypes.CDLL:
        """Load a copy of the library, with memory of its own: one file is loaded only once."""
        copy = self._object.with_name(f"{self._object.name}.{os.getpid()}.{next(_copies)}")
        copy.write_bytes(self._object.read_bytes())
        try:
            return ctypes.CDLL(str(copy), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        except OSError as error:
            raise PagecacheError(
                f"the policy {self.info.name} cannot be simulated", str(error)
            ) from error
        finally:
            copy.unlink()

    def replay(
        self,
        trace: Trace,
        memory: int,
        *,
        unit: int = SMALLEST_UNIT,
        order: int = KERNEL,
        policy: bool = True,
        knobs: Mapping[str, int] | None = None,
        watch: Callable[[Replay, int], None] | None = None,
        begin: Callable[[Replay], None] | None = None,
        name: str = "",
    ) -> Result:
        """Replay a trace through a cache of its own, empty at first.

        Args:
            trace: what is read, and hints to the policy.
            memory: bytes of the cache.
            unit: bytes of a page, a power of 2.
            order: in what order pages are reclaimed that the policy does not name: KERNEL or LRU.
            policy: whether it is asked; without it, only the order decides.
            knobs: settings of the policy, by name.
            watch: called with the replay and each access's number, after the access.
            begin: called with the replay before the first access.
            name: of the result; by default the policy's, or the order's.

        Returns:
            What was read, found and reclaimed.

        Raises:
            PolicyRejected: the policy's init failed.
            UsageError: hints do not fit its maps, or the memory is less than a page.
            MemoryError: the trace has too many pages.
        """
        if memory < unit:
            raise UsageError(f"{memory} bytes are no memory", f"a page has {unit}")
        with Replay(self._fresh(), self.info, trace, unit) as run:
            run.start(memory, order, policy, knobs or {})
            if begin is not None:
                begin(run)
            run.feed(policy, watch)
            return run.result(name or (self.info.name if policy else ("default", "lru")[order]))


class Replay:
    """One run.  A context manager: leaving it frees the model's memory.

    Args:
        library: the compiled policy, with memory that no other run has.
        info: the policy.
        trace: what is read.
        unit: bytes of a page, a power of 2.
    """

    def __init__(self, library: ctypes.CDLL, info: PolicyInfo, trace: Trace, unit: int) -> None:
        self.library, self.info, self.trace = library, info, trace
        self.shift = unit.bit_length() - 1
        self._maps: dict[str, HintMap] = {}
        library.sim_start.restype = ctypes.c_int64
        library.sim_start.argtypes = (
            *(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_bool, ctypes.c_uint32),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
        )
        library.sim_replay.restype = ctypes.POINTER(_Totals)
        library.sim_replay.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        library.sim_resident_pages.restype = ctypes.c_uint64
        library.sim_exit.restype = ctypes.c_char_p
        library.sim_hint.restype = library.sim_report.restype = ctypes.c_long

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.sim_end()

    def start(self, memory: int, order: int, policy: bool, knobs: Mapping[str, int]) -> None:
        """Set the knobs, and tell the model of the cache about the files.

        Args:
            memory: bytes of the cache.
            order: KERNEL or LRU.
            policy: whether the policy is asked.
            knobs: settings of the policy, by name.

        Raises:
            UsageError: a knob is of a type that cannot be set here.
            PolicyRejected: the policy's init failed.
            MemoryError: the trace has too many pages.
        """
        for knob in self.info.knobs:
            size = _KNOB_TYPES.get(knob.ctype)
            if size is None:
                raise UsageError(f"the knob {knob.name} cannot be set", f"it is a {knob.ctype}")
            if knob.name in knobs:
                size.in_dll(self.library, knob.name).value = knobs[knob.name]
        files = self.trace.files
        sizes = array("Q", (file.size for file in files))
        models = array("I", (self.trace.model_id(file.model) for file in files))
        governed = bytes(file.governed for file in files)
        parents = array("Q", self._parents())
        code = self.library.sim_start(
            *(memory, self.shift, order, policy, len(files)),
            *(sizes.buffer_info()[0], models.buffer_info()[0], governed),
        )
        if not code:
            code = self.library.sim_cgroups(
                ctypes.c_uint64(len(parents)), ctypes.c_void_p(parents.buffer_info()[0])
            )
        if code == -12:
            raise MemoryError(f"{sum(sizes) >> self.shift} pages are too many")
        if code < 0:
            raise PolicyRejected(
                f"the policy {self.info.name} cannot be simulated",
                f"its init failed: {os.strerror(-code)}",
            )

    def feed(self, policy: bool, watch: Callable[[Replay, int], None] | None) -> None:
        """Replay all events: as many at a time as there are between hints.

        Args:
            policy: whether hints are written to the policy's maps.
            watch: called with the replay and each access's number; it has them replayed one by one.
        """
        batch: list[Access] = []
        for number, event in enumerate(self.trace.events):
            if isinstance(event, Access):
                batch.append(event)
                if watch is None and len(batch) < 65536:
                    continue
            self._run(batch)
            batch = []
            if isinstance(event, HintEvent) and policy:
                self.hint(event)
            elif watch is not None:
                watch(self, number)
        self._run(batch)

    def _run(self, batch: list[Access]) -> None:
        events = (Event * len(batch))(*(_event(access) for access in batch))
        self.totals = self.library.sim_replay(events, len(batch)).contents

    def hint(self, event: HintEvent) -> None:
        """Write to a map of the policy, as `pagecache-bpf hint` would.

        Args:
            event: the map's name, key and value; names of models and files stand for their numbers.

        Raises:
            UsageError: the policy has no such map, or it does not take the numbers.
        """
        numbers = {
            **resolve(event.key, self._model, self._cgroup, self._file, lambda: event.time_ns),
            **resolve(event.value, self._model, self._cgroup, self._file, lambda: event.time_ns),
        }
        found = self._map(event.map)
        key, value = found.split(numbers)
        error = self.library.sim_hint(
            *_address(self.library, found), found.encode_key(key), found.encode_value(value)
        )
        if error:
            raise UsageError(f"the map {found.name} was not written", os.strerror(-error))

    def report(self, name: str) -> Iterator[dict[str, Any]]:
        """Read a map of the policy, as it is now.

        Args:
            name: the map's.

        Yields:
            The elements, each with its fields as numbers.

        Raises:
            UsageError: the policy has no such map.
        """
        found = self._map(name)
        where, key = _address(self.library, found), None
        while True:
            after, value = (ctypes.create_string_buffer(n) for n in _sizes(found))
            if self.library.sim_report(*where, key, after, value):
                return
            key = after
            yield found.decode(after.raw, value.raw)

    def resident_bytes(self, file: str) -> int:
        """Tell how much of a file is in the cache now.

        Args:
            file: its name in the trace.

        Returns:
            Bytes, in whole pages.
        """
        pages = self.library.sim_resident_pages(ctypes.c_uint32(self.trace.file(file)))
        return int(pages) << self.shift

    def result(self, name: str) -> Result:
        """Sum up the replay so far.

        Args:
            name: what the result is called.

        Returns:
            The totals, the policy's gauges and, if it has ended itself, its message.
        """
        code = ctypes.c_int64()
        message = self.library.sim_exit(ctypes.byref(code))
        return Result(
            name,
            {member: getattr(self.totals, member) for member in TOTALS},
            {
                gauge.name: ctypes.c_uint64.in_dll(self.library, gauge.name).value
                for gauge in gauges_of(self.info)
            },
            f"{message.decode(errors='replace')} ({code.value})" if message else None,
        )

    def _map(self, name: str) -> HintMap:
        if name not in self._maps:
            self._maps[name] = find_map(self.info.name, maps_of(self.info), name)
        return self._maps[name]

    def _model(self, name: str) -> int:
        try:
            return self.trace.model_id(name)
        except ValueError:
            known = ", ".join(self.trace.models)
            raise UsageError(f"the trace has no model {name}", f"it has {known}") from None

    def _cgroup(self, name: str) -> int:
        if name not in self.trace.cgroups:
            known = ", ".join(self.trace.cgroups) or "none"
            raise UsageError(f"the trace has no control group {name}", f"it has {known}")
        return self.trace.cgroups.index(name) + 1

    def _parents(self) -> list[int]:
        """Return the parent of each control group by its path; 0 where the trace has none."""
        groups = self.trace.cgroups
        above = (name.rpartition("/")[0] for name in groups)
        return [groups.index(name) + 1 if name in groups else 0 for name in above]

    def _file(self, name: str) -> Mapping[str, int]:
        number = next((n for n, file in enumerate(self.trace.files) if file.name == name), None)
        if number is None:
            raise UsageError(f"the trace has no file {name}")
        return {"ino": number + 1, "dev_major": 8, "dev_minor": 0, "generation": 0}


_KNOB_TYPES: dict[str, Any] = {
    **{name: ctypes.c_uint64 for name in ("u64", "__u64")},
    **{name: ctypes.c_uint32 for name in ("u32", "__u32")},
    **{name: ctypes.c_int64 for name in ("s64", "__s64")},
    **{name: ctypes.c_int32 for name in ("s32", "__s32")},
    **{name: ctypes.c_uint8 for name in ("u8", "__u8", "bool", "_Bool")},
    **{name: ctypes.c_uint16 for name in ("u16", "__u16")},
}


def _event(access: Access) -> Event:
    return Event(
        access.time_ns,
        access.offset,
        access.length,
        access.cgroup,
        access.file,
        access.consumer + 1000,
        _KIND_READ,
    )


def _sizes(found: HintMap) -> tuple[int, int]:
    return max(found.key_size, 4), found.value_size


def _address(library: ctypes.CDLL, found: HintMap) -> tuple[Any, Any]:
    """Return the address of a map in the library, and its struct sim_shape."""
    shape = (ctypes.c_uint32 * 4)(found.type, found.key_size, found.value_size, found.max_entries)
    return ctypes.byref(ctypes.c_char.in_dll(library, found.name)), shape


@dataclass
class PageAccesses:
    """A trace as accesses of single pages; pages of all files are numbered in one row.

    Attributes:
        first: number of each file's first page.
        pages: what is accessed, in the order of time.
        weights: bytes of each access.
        events: place in Trace.events of each access.
    """

    first: list[int]
    pages: array[int]
    weights: array[int]
    events: array[int]


def page_accesses(trace: Trace, unit: int) -> PageAccesses:
    """Split the reads of a trace.

    Args:
        trace: the trace whose reads are split into pages.
        unit: bytes of a page, a power of 2.

    Returns:
        An access a page, in order: which page, how many bytes of it, and which event it is of.
    """
    shift = unit.bit_length() - 1
    found, pages = PageAccesses([], array("q"), array("q"), array("q")), 0
    for file in trace.files:
        found.first.append(pages)
        pages += -(-file.size // unit)
    for number, access in enumerate(trace.events):
        if not isinstance(access, Access):
            continue
        at, end = access.offset, access.offset + access.length
        while at < end:
            stop = min(end, (at // unit + 1) * unit)
            found.pages.append(found.first[access.file] + (at >> shift))
            found.weights.append(stop - at)
            found.events.append(number)
            at = stop
    return found


def best(trace: Trace, memory: int, unit: int = SMALLEST_UNIT) -> Result:
    """Compute the optimum for a trace, in the shape of a replay's result.

    Args:
        trace: what is read.
        memory: bytes of the cache.
        unit: bytes of a page, a power of 2.

    Returns:
        The result, with no gauges: no policy ran.
    """
    shift = unit.bit_length() - 1
    split = page_accesses(trace, unit)
    wanted, weights = split.pages, split.weights
    found = optimum(wanted, memory >> shift, weights)
    total, distinct = sum(weights), len(set(wanted))
    totals = dict.fromkeys(TOTALS, 0)
    totals["wanted_bytes"], totals["hit_bytes"] = total, found.hit_weight
    totals["missed_bytes"] = total - found.hit_weight
    totals["read_bytes"] = (len(wanted) - found.hits) * unit
    totals["reread_bytes"] = (len(wanted) - found.hits - distinct) * unit
    totals["peak_bytes"] = min(distinct, memory >> shift) * unit
    return Result("optimum", totals, {})


def compare(
    info: PolicyInfo,
    trace: Trace,
    memory: int,
    knobs: Mapping[str, int] | None = None,
    unit: int = SMALLEST_UNIT,
) -> list[Result]:
    """Replay a trace under a policy and under what it has to be better than.

    Args:
        info: the policy, with its source.
        trace: what is read, and hints to the policy.
        memory: bytes of the cache.
        knobs: settings of the policy, by name.
        unit: bytes of a page, a power of 2.

    Returns:
        Results of the policy, the kernel's own order, LRU and the optimum, in this order.
    """
    simulator = Simulator(info)
    return [
        simulator.replay(trace, memory, unit=unit, knobs=knobs),
        simulator.replay(trace, memory, unit=unit, policy=False),
        simulator.replay(trace, memory, unit=unit, policy=False, order=LRU),
        best(trace, memory, unit),
    ]
