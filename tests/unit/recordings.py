# SPDX-License-Identifier: Apache-2.0
"""A recording whose every number is known: what the tests of reports start from."""

from __future__ import annotations

import numpy as np

from pagecache_bpf.recording.format import (
    COUNTERS,
    EVENT,
    EXPECTED,
    ExpectedOrder,
    RecordedFile,
    RecordedTensor,
    Recording,
    Sample,
)
from pagecache_bpf.recording.phases import Phase

MIB = 1 << 20
TICK = 10_000_000


def event(file: int, cell: int, tick: int, tgid: int = 0, **counters: int) -> tuple[int, ...]:
    """A row of the events."""
    return (file, cell, tick, tgid, *(counters.get(name, 0) for name in COUNTERS))


def load(names: tuple[str, ...] = ("a.weight", "b.weight")) -> Recording:
    """Two files of 7 and 5 MiB in cells of 1 MiB, read by two processes; primes tell apart."""
    rows = []
    for cell in range(7):  # prefetched in tick 2, used cell by cell from tick 3
        rows.append(event(0, cell, 2, prefetched_bytes=MIB))
        rows.append(event(0, cell, 3 + cell, 101, useful_bytes=MIB))
    for cell in range(5):  # missed, with a stall of a prime number of nanoseconds each
        rows.append(event(1, cell, 11 + cell, 103, miss_bytes=MIB, stall_ns=1_000_003))
        rows.append(event(1, cell, 11 + cell, read_bytes=MIB))
    rows.append(event(0, 0, 16, dropped_bytes=MIB))
    rows.sort(key=lambda row: row[2])
    return Recording(
        model="tiny",
        policy="sequential",
        engine="agent",
        command="cat <model>",
        kernel="6.18.0",
        started_ns=1_700_000_000_000_000_000,
        seconds=0.17,
        tick_ns=TICK,
        cell_bytes=MIB,
        files=[RecordedFile("/m/one.safetensors", 7 * MIB), RecordedFile("/m/two", 5 * MIB)],
        tensors=[
            RecordedTensor(index, name, 0, size * MIB)
            for index, (name, size) in enumerate(zip(names, (7, 5), strict=False))
        ],
        readers={101: "rank0", 103: "rank1"},
        events=np.array(rows, EVENT),
        samples=[Sample(0, 0), Sample(17 * TICK, 12 * MIB)],
        phases=[Phase(3 * TICK, "weights", 101)],
        expected=ExpectedOrder(
            "derived: safetensors keys",
            np.array([(0, 0, 0, 7 * MIB), (0, 1, 0, 5 * MIB)], EXPECTED),
        ),
        device="8:0",
        device_limit=100.0 * MIB,
        lost=0,
        exit_code=0,
    )
