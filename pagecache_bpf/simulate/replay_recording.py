# SPDX-License-Identifier: Apache-2.0
"""Replays of a trace as recordings, so that `report` draws what a policy would have done."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagecache_bpf.recording.format import (
    COUNTERS,
    EVENT,
    SIMULATION,
    RecordedFile,
    Recording,
    Sample,
)
from pagecache_bpf.simulate.optimum import optimum
from pagecache_bpf.simulate.simulator import SMALLEST_UNIT, Replay, Simulator, page_accesses
from pagecache_bpf.simulate.trace import Access, Trace

TICKS, CELLS = 600, 1024
#: The order of SIM_NOTE_* in bpf/include/simulate_cache.h.
NOTES = (
    "hit_bytes",
    "useful_bytes",
    "miss_bytes",
    "prefetched_bytes",
    "read_bytes",
    "reclaimed_bytes",
    "dropped_bytes",
    "wasted_bytes",
)
#: Of these, what a reader did; the others are nobody's.
_ACCESSES = frozenset(NOTES[:3])
_FIRST_TGID = 1000  # as the simulator counts its consumers


@dataclass
class _Sums:
    """What a replay went through, by file, cell, interval and reader."""

    trace: Trace
    unit: int
    rows: dict[tuple[int, int, int, int], dict[str, int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        times = [event.time_ns for event in self.trace.events]
        self.begin = times[0]
        self.tick_ns = (times[-1] - self.begin) // TICKS + 1
        total = sum(file.size for file in self.trace.files)
        self.cell_pages = max(1, -(-total // (CELLS * self.unit)))
        self.samples.append(Sample(0, 0))

    def tick(self, event: int) -> int:
        """Return the interval of an event."""
        return (self.trace.events[event].time_ns - self.begin) // self.tick_ns

    def add(self, file: int, cell: int, event: int, name: str, count: int) -> None:
        """Add bytes to a counter."""
        access = self.trace.events[event]
        tgid = 0
        if name in _ACCESSES and isinstance(access, Access):
            tgid = access.consumer + _FIRST_TGID
        row = self.rows.setdefault((file, cell, self.tick(event), tgid), {})
        row[name] = row.get(name, 0) + count

    def read_until(self, event: int, count: int) -> None:
        """Note how many bytes the device has read by the end of an event's interval."""
        at = (self.tick(event) + 1) * self.tick_ns
        if self.samples[-1].time_ns == at:
            self.samples.pop()
        self.samples.append(Sample(at, count))

    def recording(self, policy: str, name: str) -> Recording:
        """Return them as a recording."""
        rows = [
            (*place, *(counters.get(counter, 0) for counter in COUNTERS))
            for place, counters in self.rows.items()
        ]
        rows.sort(key=lambda row: (row[2], row[0], row[1], row[3]))
        trace = self.trace
        return Recording(
            model=name,
            policy=policy,
            engine=SIMULATION if policy else "",
            kernel="none: a model of the page cache",
            seconds=(trace.events[-1].time_ns - self.begin) / 1e9,
            tick_ns=self.tick_ns,
            cell_bytes=self.cell_pages * self.unit,
            files=[RecordedFile(file.name, file.size) for file in trace.files],
            readers={_FIRST_TGID + at: text for at, text in enumerate(trace.consumers)},
            events=np.array(rows, EVENT),
            samples=self.samples,
            uncounted=("late_bytes", "stall_ns"),
        )


def record(
    simulator: Simulator,
    trace: Trace,
    memory: int,
    *,
    unit: int = SMALLEST_UNIT,
    knobs: Mapping[str, int] | None = None,
    policy: bool = True,
    name: str = "trace",
) -> Recording:
    """Replay a trace and return what its files went through.

    Args:
        simulator: the policy.
        trace: what is read.
        memory: bytes of the page cache.
        unit: bytes of a page, a power of 2.
        knobs: settings of the policy.
        policy: without it, the kernel's lists alone decide.
        name: of the model, for people.

    Returns:
        The recording, in the form of one of a real load; what a real one lacks is 0.

    Raises:
        PolicyRejected: the policy's init failed.
        UsageError: hints do not fit its maps.
        MemoryError: there are too many pages.
    """
    sums = _Sums(trace, unit)
    notes: Any = None
    places: list[tuple[int, int]] = []

    def begin(replay: Replay) -> None:
        nonlocal notes
        count = ctypes.c_uint64()
        start = replay.library.sim_record
        start.restype = ctypes.c_void_p
        where = start(ctypes.c_uint64(sums.cell_pages), ctypes.byref(count))
        if not where:
            raise MemoryError(f"{count.value} parts are too many")
        array = (ctypes.c_uint64 * (count.value * len(NOTES))).from_address(where)
        notes = np.ctypeslib.as_array(array).reshape(-1, len(NOTES))
        for number, file in enumerate(trace.files):
            pages = -(-file.size // unit)
            places.extend((number, cell) for cell in range(-(-pages // sums.cell_pages)))

    def group(event: int) -> tuple[int, int] | None:
        """Return the interval and the reader of an event: those with equal ones go together."""
        if event >= len(trace.events):
            return None
        access = trace.events[event]
        return sums.tick(event), access.consumer if isinstance(access, Access) else -1

    def watch(replay: Replay, event: int) -> None:
        if group(event + 1) == group(event):
            return
        for cell, note in zip(*np.nonzero(notes), strict=True):
            file, part = places[int(cell)]
            sums.add(file, part, event, NOTES[int(note)], int(notes[cell, note]))
        notes[:] = 0
        sums.read_until(event, replay.totals.read_bytes)

    simulator.replay(trace, memory, unit=unit, knobs=knobs, policy=policy, watch=watch, begin=begin)
    return sums.recording(simulator.info.name if policy else "", name)


def record_best(
    trace: Trace, memory: int, *, unit: int = SMALLEST_UNIT, name: str = "trace"
) -> Recording:
    """Return what the files of a trace go through in a cache that knows the future.

    Args:
        trace: what is read.
        memory: bytes of the page cache.
        unit: bytes of a page, a power of 2.
        name: of the model, for people.

    Returns:
        The recording, in the form of one of a real load.
    """
    sums, split = _Sums(trace, unit), page_accesses(trace, unit)
    firsts = np.array(split.first)
    read = 0

    def place(page: int) -> tuple[int, int]:
        file = int(np.searchsorted(firsts, page, "right")) - 1
        return file, (page - split.first[file]) // sums.cell_pages

    def watch(at: int, hit: bool, gone: int | None) -> None:
        nonlocal read
        event, where = split.events[at], place(split.pages[at])
        sums.add(*where, event, "hit_bytes" if hit else "miss_bytes", split.weights[at])
        if not hit:
            read += unit
            sums.add(*where, event, "read_bytes", unit)
            sums.read_until(event, read)
        if gone is not None:
            sums.add(*place(gone), event, "reclaimed_bytes", unit)

    optimum(split.pages, memory // unit, split.weights, watch)
    return sums.recording("optimum", name)
