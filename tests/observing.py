# SPDX-License-Identifier: Apache-2.0
"""Workloads of known counts for the observer, on any kernel: what they want, and what was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cachestat import PAGE_SIZE, drop, resident_pages
from pagecache_bpf.observer import Observer
from pagecache_bpf.policy.agent_device import AgentDevice
from pagecache_bpf.recording.format import Recording

# Reads as it is told: a list of [what, ...] with offsets and lengths in bytes.
_READER = """
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None)
libc.readahead.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_size_t)
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
for what, *how in json.loads(sys.argv[2]):
    if what == "pread":
        for offset, length in how:
            os.pread(fd, length, offset)
    elif what == "stream":
        os.lseek(fd, 0, 0)
        while os.read(fd, how[0]):
            pass
    elif what == "touch":
        advice, places = how
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
            if advice:
                mapping.madvise(advice)
            for place in places or range(0, size, mmap.PAGESIZE):
                mapping[place]
    elif what == "copy":
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
            mapping.madvise(how[0])
            kept = [bytearray(mapping[at : at + how[1]]) for at in range(0, size, how[1])]
    elif what == "advise":
        os.posix_fadvise(fd, how[0], how[1], how[2])
    elif what == "readahead":
        assert libc.readahead(fd, how[0], how[1]) == 0
    elif what == "other":
        with open(how[0], "rb", buffering=0) as other:
            while other.read(how[1]):
                pass
"""


def reader_command(path: Path, *steps: list[object], first: str = "") -> list[str]:
    """A process that does these steps with a file; first: what it runs before."""
    return [sys.executable, "-c", first + _READER, str(path), json.dumps(steps)]


def reader(path: Path, *steps: list[object]) -> int:
    """Do these steps with a file in a process of its own; returns its number."""
    with subprocess.Popen(reader_command(path, *steps)) as process:
        assert process.wait(timeout=300) == 0
    return process.pid


def counted_since_tag(name: str) -> dict[str, Any]:
    """Return a model that the agent observes, with its counters since it was tagged."""
    with AgentDevice() as agent:
        (model,) = (found for found in agent.stats()["models"] if found["model"] == name)
    before = model["counters_before"]
    since = {counter: value - before[counter] for counter, value in model["counters"].items()}
    return {**model, "counters": since}


def stream(piece: int = 128 << 10) -> list[object]:
    """read() from front to back."""
    return ["stream", piece]


def pread(*ranges: tuple[int, int]) -> list[object]:
    """pread() each (offset, length)."""
    return ["pread", *ranges]


def touch(*places: int, advice: int = 0) -> list[object]:
    """Touch a byte at each place of a new mapping, by default in every page."""
    return ["touch", advice, places]


def copy(piece: int, advice: int) -> list[object]:
    """Copy a new mapping to memory, so many bytes an allocation."""
    return ["copy", advice, piece]


def pages(*ranges: tuple[int, int]) -> int:
    """Pages that reads of these (offset, length) touch, each read for itself."""
    return sum((at + size - 1) // PAGE_SIZE - at // PAGE_SIZE + 1 for at, size in ranges)


@contextmanager
def observing(*paths: Path, **options: object) -> Iterator[Observer]:
    """An observer of these files, as the model "test"."""
    with Observer(**options) as observer:  # type: ignore[arg-type]
        for path in paths:
            tag(observer, path)
        yield observer


def tag(observer: Observer, path: Path, model: str = "test") -> None:
    """Observe a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        observer.tag(fd, model, path=str(path))
    finally:
        os.close(fd)


class Counts(dict[str, int]):
    """Counters in pages (times in nanoseconds); what is not named is not looked at."""

    def __sub__(self, other: Counts) -> Counts:
        return Counts({name: value - other[name] for name, value in self.items()})

    def __getattr__(self, name: str) -> int:
        return self[name]


def counts(observer: Observer, tgid: int | None = None) -> Counts:
    """Of the model "test", or of one of its consumers."""
    shown: dict[str, Any] = observer.snapshot()
    (model,) = (model for model in shown["models"] if model["model"] == "test")
    assert shown["lost_events"] == 0
    every = [model] if tgid is None else [e for e in model["consumers"] if e["tgid"] == tgid]
    (found,) = every
    return Counts(
        {
            name.removesuffix("_bytes"): value // (PAGE_SIZE if name.endswith("_bytes") else 1)
            for name, value in found["counters"].items()
        }
    )


def consistent(found: Counts, *paths: Path) -> None:
    """What must hold of any counts of these files since they were cold."""
    assert found.read == found.read_hit + found.read_ahead + found.read_miss
    assert found.mmap == found.mmap_hit + found.mmap_ahead + found.mmap_miss
    assert found.added - found.removed == sum(map(resident_pages, paths))
    causes = [value for name, value in found.items() if name.startswith("evicted_")]
    assert found.removed == sum(causes)
    assert found.added == (found.demand + found.readahead + found.requested + found.prefetched)


#: What a recording has, and the observer's counters that it is the sum of.
_RECORDED = {
    ("hit_bytes", "useful_bytes", "late_bytes"): ("read_hit_bytes", "mmap_hit_bytes"),
    ("useful_bytes",): ("prefetch_useful_bytes",),
    ("late_bytes",): ("prefetch_late_bytes",),
    ("ahead_bytes",): ("read_ahead_bytes", "mmap_ahead_bytes"),
    ("miss_bytes",): ("read_miss_bytes", "mmap_miss_bytes"),
    ("prefetched_bytes",): ("prefetched_bytes",),
    ("read_bytes",): ("demand_bytes", "readahead_bytes", "requested_bytes"),
    ("reclaimed_bytes",): ("evicted_reclaim_bytes",),
    ("dropped_bytes",): ("evicted_drop_bytes",),
    ("discarded_bytes",): (
        "evicted_fadvise_bytes",
        "evicted_truncate_bytes",
        "evicted_other_bytes",
    ),
    ("wasted_bytes",): ("prefetch_wasted_bytes",),
    ("stall_ns",): ("read_stall_ns", "mmap_stall_ns"),
}
#: What a recording says of each reader; the rest is nobody's.
_OF_READERS = ("hit_bytes", "useful_bytes", "late_bytes", "ahead_bytes", "miss_bytes", "stall_ns")


def recorded_exactly(recording: Recording, counters: dict[int, dict[str, int]]) -> None:
    """Every class of a recording is, to the byte, what the observer has counted, by reader, too.

    counters: what Recorder.counters() has said at the recording's end.
    """
    assert recording.lost == 0
    for tgid, counted in counters.items():
        events = recording.events
        if tgid:
            events = events[events["tgid"] == tgid]
        for ours, theirs in _RECORDED.items():
            if tgid and not set(ours) <= set(_OF_READERS):
                continue
            found = sum(int(events[name].sum()) for name in ours)
            assert found == sum(counted[name] for name in theirs), (tgid, ours)


__all__ = [
    "PAGE_SIZE",
    "Counts",
    "consistent",
    "counts",
    "drop",
    "observing",
    "pages",
    "pread",
    "reader",
    "reader_command",
    "recorded_exactly",
    "stream",
    "tag",
    "touch",
]
