# SPDX-License-Identifier: Apache-2.0
"""Where a template expects a load's readers to be, against where they are.

A template knows an order and no times: it is laid over a load by how much of the model its readers
have had so far.  A load that follows its template reads where the line is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.reporting.grid import ACCESSED, Grid

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TemplateLine:
    """The line of a template over a grid.

    Attributes:
        cells: pairs of column and row: what the template expects to be wanted in a column.
        place: for each row, how many bytes the template wants before it; -1: it does not list it.
        distance: how far from its place in the template a byte was first read, on average, in
            bytes; None: nothing was read that the template lists.
    """

    cells: npt.NDArray[np.int32]
    place: npt.NDArray[np.float64]
    distance: float | None


def line(grid: Grid) -> TemplateLine | None:
    """Lay the template of a recording over its grid.

    Where a template has as many consumers as there were readers, each is compared with its own: in
    the order of their process numbers, which is that of the ranks that a launcher starts.
    Otherwise all readers together are compared with each consumer.

    Args:
        grid: the recording, reduced.

    Returns:
        The line; None where the recording has no template.
    """
    table = grid.recording.expected.ranges
    if not len(table):
        return None
    consumers = np.unique(table["consumer"]).tolist()
    apart = len(consumers) == len(grid.readers) > 1
    place = np.full(grid.rows, -1.0)
    cells, far, read = [], 0.0, 0
    for at, consumer in enumerate(consumers):
        rows, before, after = _segments(grid, table[table["consumer"] == consumer])
        accessed = _accessed(grid, at if apart else None)
        size = -(-grid.total_bytes // grid.rows)
        # a byte that is read again is no progress
        progress = np.minimum(np.cumsum(accessed, axis=1), size).sum(axis=0)
        cells.append(_expected_cells(rows, before, after, progress))
        listed, first = np.unique(rows, return_index=True)
        place[listed] = np.where(
            place[listed] < 0, before[first], np.minimum(place[listed], before[first])
        )
        was_read = accessed[listed].any(axis=1)
        column = accessed[listed].astype(bool).argmax(axis=1)
        had = np.concatenate(([0], progress))
        away = np.maximum(before[first] - had[column + 1], had[column] - after[first])
        weight = accessed[listed].sum(axis=1) * was_read
        far += float((np.maximum(away, 0) * weight).sum())
        read += int(weight.sum())
    return TemplateLine(np.concatenate(cells), place, far / read if read else None)


def _segments(grid: Grid, table: Any) -> tuple[Ints, Ints, Ints]:
    """Return rows in the order of a consumer, and the bytes it has had before and after each."""
    first = np.asarray(grid.row_of(table["file"], table["offset"]), np.int64)
    last = np.asarray(
        grid.row_of(table["file"], table["offset"] + np.maximum(table["bytes"], 1) - 1), np.int64
    )
    last = np.maximum(first, last)
    many = last - first + 1
    number = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
    rows = np.repeat(first, many) + number
    begin = np.repeat(np.cumsum(table["bytes"]) - table["bytes"], many)
    share = np.repeat(table["bytes"] / many, many)
    before = (begin + share * number).astype(np.int64)
    after = (begin + share * (number + 1)).astype(np.int64)
    fresh = np.concatenate(([True], np.diff(rows) != 0))
    starts = np.flatnonzero(fresh)
    return rows[starts], before[starts], after[np.append(starts[1:], len(rows)) - 1]


def _accessed(grid: Grid, reader: int | None) -> Ints:
    """Return what a reader, or all of them, accessed in each row and column, in bytes."""
    return grid.matrix(*ACCESSED, reader=reader)


def _expected_cells(rows: Ints, before: Ints, after: Ints, progress: Ints) -> npt.NDArray[np.int32]:
    """Return what is expected in each column, in which readers came from here to there."""
    had = np.concatenate(([0], progress[:-1]))
    moved = np.flatnonzero(progress > had)
    first = np.searchsorted(after, had[moved], "right")
    last = np.searchsorted(before, progress[moved], "left")
    many = np.maximum(0, last - first)
    number = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
    columns, places = np.repeat(moved, many), np.repeat(first, many) + number
    return np.stack([columns, rows[places]], axis=1).astype(np.int32)
