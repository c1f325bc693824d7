# SPDX-License-Identifier: Apache-2.0
"""Reduces a recording to a grid of file offset and time that fits a screen, whatever its size.

All files of a model stand one after the other on the axis of bytes; rows are equal parts of it,
columns equal parts of the time from the first event to the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.recording.format import COUNTERS, Recording

MAX_ROWS, MAX_COLUMNS, LEAST_COLUMNS = 1024, 600, 50
#: So many events go into the page at most; with more, columns are joined.
MAX_DETAILS = 15_000

#: What a cell of the grid shows behind the accesses.
EMPTY, RESIDENT, PREFETCHED, EVICTED = range(4)
#: What an access found, as the page draws it; 0: no access.
HIT, AHEAD, LATE, MISS = range(1, 5)
_FOUND: dict[int, tuple[str, ...]] = {
    HIT: ("hit_bytes", "useful_bytes"),
    AHEAD: ("ahead_bytes",),
    LATE: ("late_bytes",),
    MISS: ("miss_bytes",),
}
#: Counters of what readers wanted.
ACCESSED = tuple(name for names in _FOUND.values() for name in names)
_ENTERED = ("prefetched_bytes", "read_bytes")
_LEFT = ("reclaimed_bytes", "dropped_bytes", "discarded_bytes")
#: Levels of how much of a row is resident.
LEVELS = 4

Matrix = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Details:
    """What happened in one row during one column, by one reader; arrays of equal length.

    Attributes:
        row: rows of the grid.
        column: columns of the grid.
        reader: places in Grid.readers; -1: no reader did it.
        counters: one column for each counter of kernel.abi.RECORDED.
    """

    row: npt.NDArray[np.int32]
    column: npt.NDArray[np.int32]
    reader: npt.NDArray[np.int32]
    counters: Matrix


class Grid:
    """A recording, reduced.

    Attributes:
        recording: what it was made from.
        rows, columns: the size of the grid.
        bases: where each file begins on the axis of bytes.
        total_bytes: the size of all files.
        begin_ns: when the first column begins, after the recording's start, in nanoseconds.
        column_ns: the length of a column, in nanoseconds.
        readers: numbers of the processes that read.
    """

    def __init__(self, recording: Recording) -> None:
        """Reduce a recording.

        Args:
            recording: what `record` has written of one load.
        """
        self.recording = recording
        sizes = [file.bytes for file in recording.files]
        self.bases = [0, *np.cumsum(sizes).tolist()]
        self.total_bytes = max(1, self.bases.pop())
        cells = sum(-(-size // max(1, recording.cell_bytes)) for size in sizes)
        self.rows = max(1, min(MAX_ROWS, cells))
        events = recording.events
        self._first_tick = int(events["tick"].min()) if len(events) else 0
        self.ticks = int(events["tick"].max()) - self._first_tick + 1 if len(events) else 1
        self.begin_ns = self._first_tick * recording.tick_ns
        self.readers = sorted({int(tgid) for tgid in np.unique(events["tgid"])} - {0})
        self.columns = max(1, min(MAX_COLUMNS, self.ticks))
        while len(self.details.row) > MAX_DETAILS and self.columns > LEAST_COLUMNS:
            self.columns = max(LEAST_COLUMNS, self.columns // 2)
            del self.details
        self.column_ns = self.ticks * recording.tick_ns / self.columns

    def row_of(self, file: Any, offset: Any) -> Any:
        """Return the row of an offset in a file; arrays of both give an array.

        Args:
            file: the file's place in the recording.
            offset: in bytes.

        Returns:
            The row, from 0 at the first byte of the first file; an array for arrays.
        """
        place = np.asarray(self.bases, np.int64)[file] + offset
        return np.minimum(place * self.rows // self.total_bytes, self.rows - 1)

    def _places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the row and the column of each event of the recording."""
        events = self.recording.events
        offset = events["cell"].astype(np.int64) * self.recording.cell_bytes
        row = self.row_of(events["file"], offset)
        tick = events["tick"].astype(np.int64) - self._first_tick
        column = tick * self.columns // self.ticks
        return np.asarray(row, np.int64), column

    @cached_property
    def details(self) -> Details:
        """The events, added up by row, column and reader."""
        events = self.recording.events
        row, column = self._places()
        reader = np.searchsorted(self.readers, events["tgid"]) if self.readers else 0 * row
        reader = np.where(events["tgid"] == 0, -1, reader)
        keys = (row * self.columns + column) * (len(self.readers) + 1) + reader + 1
        unique, place = np.unique(keys, return_inverse=True)
        counters = np.zeros((len(unique), len(COUNTERS)), np.int64)
        for at, name in enumerate(COUNTERS):
            np.add.at(counters[:, at], place, events[name])
        rest, found = np.divmod(unique, len(self.readers) + 1)
        rows, columns = np.divmod(rest, self.columns)
        return Details(
            rows.astype(np.int32), columns.astype(np.int32), (found - 1).astype(np.int32), counters
        )

    def matrix(self, *names: str, reader: int | None = None) -> Matrix:
        """Return the sum of some counters for each row and column.

        Args:
            names: of kernel.abi.RECORDED.
            reader: a place in Grid.readers: only what this one did; None: whoever did it.

        Returns:
            An array of `rows` by `columns`.
        """
        found = np.zeros((self.rows, self.columns), np.int64)
        details = self.details
        amounts = details.counters[:, [COUNTERS.index(name) for name in names]].sum(axis=1)
        chosen = slice(None) if reader is None else details.reader == reader
        np.add.at(found, (details.row[chosen], details.column[chosen]), amounts[chosen])
        return found

    @cached_property
    def resident(self) -> Matrix:
        """Bytes of each row in the page cache at the end of each column."""
        before = np.zeros(self.rows, np.int64)
        for (file, cell), count in self.recording.resident.items():
            before[int(self.row_of(file, cell * self.recording.cell_bytes))] += count
        change = self.matrix(*_ENTERED) - self.matrix(*_LEFT)
        return np.maximum(0, before[:, None] + np.cumsum(change, axis=1))

    @cached_property
    def unused(self) -> Matrix:
        """Of these, bytes that a policy has prefetched and nobody has used yet."""
        used = self.matrix("useful_bytes", "late_bytes", "wasted_bytes")
        return np.maximum(0, np.cumsum(self.matrix("prefetched_bytes") - used, axis=1))

    def picture(self) -> npt.NDArray[np.uint8]:
        """Return what the map shows: for each row and column one byte.

        Returns:
            An array of shape (rows, columns).  The low two bits of a byte are the state (EMPTY ...
            EVICTED), the next two how much of the row is resident (0 to LEVELS - 1), the high four
            what an access found (HIT ... MISS; 0: none).
        """
        size = self.total_bytes / self.rows
        left = np.cumsum(self.matrix(*_LEFT), axis=1) > 0
        state = np.where(left, EVICTED, EMPTY)
        state = np.where(self.resident > 0, RESIDENT, state)
        state = np.where((self.resident > 0) & (self.unused * 2 > self.resident), PREFETCHED, state)
        level = np.clip(self.resident * LEVELS / size, 0, LEVELS - 1).astype(np.int64)
        found = np.stack([self.matrix(*names) for names in _FOUND.values()])
        kind = np.where(found.sum(axis=0) > 0, found.argmax(axis=0) + 1, 0)
        picture: npt.NDArray[np.uint8] = (state | level << 2 | kind << 4).astype(np.uint8)
        return picture

    def window(self) -> npt.NDArray[np.int32]:
        """Return where a policy's window is: prefetched and not used yet, as a band in each file.

        Returns:
            Rows of column, first row of the grid, row after the last one.
        """
        starts = self.row_of(np.arange(len(self.bases)), 0)
        found = []
        for column in np.flatnonzero(self.unused.any(axis=0)):
            rows = np.flatnonzero(self.unused[:, column])
            # files that share a row share a band
            edges = np.flatnonzero(np.diff(np.searchsorted(starts, rows, "right")) != 0) + 1
            for part in np.split(rows, edges):
                found.append((int(column), int(part[0]), int(part[-1]) + 1))
        return np.array(found, np.int32).reshape(-1, 3)

    def series(self) -> dict[str, list[float]]:
        """Return what the panels below the map show.

        Returns:
            Bytes in each column, by the name of the curve.  "device" and "headroom" are there only
            where the recording has samples of them.
        """
        found = {
            name: self.matrix(*names).sum(axis=0)
            for name, names in zip(("hit", "ahead", "late", "miss"), _FOUND.values(), strict=True)
        }
        found["prefetched"] = self.matrix("prefetched_bytes").sum(axis=0)
        found["resident"] = self.resident.sum(axis=0)
        found["unused"] = self.unused.sum(axis=0)
        ends = self.begin_ns + (np.arange(self.columns) + 1) * self.column_ns
        samples = self.recording.samples or []
        if samples:
            times = [sample.time_ns for sample in samples]
            edges = np.concatenate(([self.begin_ns], ends))
            read = np.interp(edges, times, [sample.device_bytes for sample in samples])
            found["device"] = np.diff(read)
            rooms = [sample.headroom for sample in samples]
            if any(room is not None for room in rooms):
                known = [room if room is not None else 0 for room in rooms]
                found["headroom"] = np.interp(ends, times, known)
        return {name: np.asarray(values).tolist() for name, values in found.items()}

    def stalls(self) -> Matrix:
        """Sum up how long readers slept for I/O.

        Returns:
            Nanoseconds, an array of shape (readers, columns).
        """
        found = np.zeros((max(1, len(self.readers)), self.columns), np.int64)
        ours = self.details.reader >= 0
        amounts = self.details.counters[:, COUNTERS.index("stall_ns")]
        np.add.at(found, (self.details.reader[ours], self.details.column[ours]), amounts[ours])
        return found
