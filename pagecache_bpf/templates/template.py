# SPDX-License-Identifier: Apache-2.0
"""What a template is: which bytes of which files are read in which order, and by whom.

It opens nothing; fit compares a template with files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights.identity import MAX_HASHED, TemplateFile

#: One extent: bytes [offset, offset + length) of a file, wanted by a consumer.  `wanted` of
#: these bytes are really used; the rest lies between them and is not worth a seek.
EXTENT = np.dtype(
    [
        ("consumer", "<u4"),
        ("file", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("wanted", "<u8"),
    ]
)
#: An extent that may be a slice of every row of a matrix: `count` ranges of `length` bytes,
#: `stride` bytes apart; `wanted` bytes of all of them are used.  count 1 and stride 0: one range.
STRIDED = np.dtype([*EXTENT.descr, ("count", "<u8"), ("stride", "<u8")])
#: An array of EXTENT or of STRIDED.  numpy has no type for the fields of one.
Extents = np.ndarray[Any, Any]

MAX_FILES = 100_000
MAX_CONSUMERS = 1024
MAX_EXTENTS = 1 << 22
MAX_SIZE = 1 << 62
_DOCS = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Template:
    """What is read of a model: extents in the order of each consumer, grouped by consumer.

    Attributes:
        files: the files that extents are of, by number.
        consumers: names of those who read, a rank or a process each, by number.
        extents: an array of EXTENT, or of STRIDED where some are slices of rows; shape (extents,).
        source: "derived", "recorded" or "imported".
        loader: whose order it is, for people.
        tp: tensor-parallel ranks of the load; 1 without.

    Raises:
        UsageError: it contradicts itself.
    """

    files: tuple[TemplateFile, ...]
    consumers: tuple[str, ...]
    extents: Extents
    source: str
    loader: str
    tp: int = 1

    def __post_init__(self) -> None:
        _check_consistency(self)

    @property
    def length(self) -> int:
        """Bytes of all extents: a byte that two consumers want counts twice."""
        return int((self.extents["length"] * counts(self.extents)).sum())

    @property
    def wanted(self) -> int:
        """Bytes that the consumers really use, each for itself."""
        return int(self.extents["wanted"].sum())

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)

    @property
    def distinct(self) -> int:
        """Bytes that at least one consumer has in an extent, counted once."""
        total = 0
        for number in np.unique(self.extents["file"]):
            rows = union(self.extents[self.extents["file"] == number])
            total += int((rows[:, 1] * rows[:, 2]).sum())
        return total

    def ranges(
        self,
    ) -> list[tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
        """Return what is covered of each file, by any consumer.

        Returns:
            For each file with extents its number, and where disjoint ranges start and end, in bytes
            and in order.
        """
        found = []
        for number in np.unique(self.extents["file"]):
            rows = union(self.extents[self.extents["file"] == number])
            found.append((int(number), *_joined(*spread(rows))))
        return found

    def plain(self, consumer: int | None = None) -> Extents:
        """Return the extents one by one: a strided one becomes many.

        Args:
            consumer: the number of one of the consumers; by default all of them.

        Returns:
            An array of EXTENT.
        """
        chosen = self.extents
        if consumer is not None:
            chosen = chosen[chosen["consumer"] == consumer]
        return expanded(chosen)

    def of(self, consumer: int) -> Extents:
        """Return the extents of one consumer, one by one and in its order.

        Args:
            consumer: the consumer's number.

        Returns:
            An array of EXTENT.
        """
        return self.plain(consumer)


def counts(extents: Extents) -> npt.NDArray[np.uint64]:
    """Return of how many ranges each extent consists.

    Args:
        extents: an array of EXTENT or STRIDED.

    Returns:
        Numbers; shape (extents,).
    """
    if "count" in (extents.dtype.names or ()):
        found: npt.NDArray[np.uint64] = extents["count"]
        return found
    return np.ones(len(extents), np.uint64)


def strides(extents: Extents) -> npt.NDArray[np.uint64]:
    """Return how far apart the ranges of each extent begin.

    Args:
        extents: an array of EXTENT or STRIDED.

    Returns:
        Bytes, 0 for a single range; shape (extents,).
    """
    if "stride" in (extents.dtype.names or ()):
        found: npt.NDArray[np.uint64] = extents["stride"]
        return found
    return np.zeros(len(extents), np.uint64)


def expanded(extents: Extents) -> Extents:
    """Make each range of strided extents an extent of its own.

    The wanted bytes of a strided extent are shared evenly among its ranges.

    Args:
        extents: an array of EXTENT or STRIDED.

    Returns:
        An array of EXTENT.
    """
    many = counts(extents).astype(np.int64)
    number = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
    found = np.zeros(len(number), EXTENT)
    for name in ("consumer", "file", "offset", "length"):
        found[name] = np.repeat(extents[name], many)
    found["offset"] += np.repeat(strides(extents), many) * number.astype(np.uint64)
    found["wanted"] = np.repeat(extents["wanted"] // np.maximum(counts(extents), 1), many)
    return found


def spread(rows: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """List the ranges of strided rows.

    Args:
        rows: offset, length, count and stride of each, in bytes; shape (rows, 4).

    Returns:
        Offsets and lengths of all ranges.
    """
    many = rows[:, 2].astype(np.int64)
    number = (np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)).astype(
        np.uint64
    )
    offsets = np.repeat(rows[:, 0], many) + np.repeat(rows[:, 3], many) * number
    return offsets, np.repeat(rows[:, 1], many)


_Row = tuple[int, int, int, int]  # offset, length, count, stride


def union(extents: Extents) -> npt.NDArray[np.uint64]:
    """Compute what extents of one file cover, as disjoint rows in order.

    Slices of the same rows are united by arithmetic on one row, without a list of all rows; extents
    that are not strided by numpy, however many they are.

    Args:
        extents: an array of EXTENT or STRIDED.

    Returns:
        Rows (offset, length, count, stride), in bytes, of shape (rows, 4); the last row of one ends
        before the next one begins.
    """
    if (counts(extents) == 1).all():
        begins, ends = _joined(extents["offset"], extents["length"])
        plain = np.zeros((len(begins), 4), np.uint64)
        plain[:, 0], plain[:, 1], plain[:, 2] = begins, ends - begins, 1
        return plain
    columns = (extents["offset"], extents["length"], counts(extents), strides(extents))
    rows = sorted(set(zip(*(column.tolist() for column in columns), strict=True)))
    found: list[_Row] = []
    group: list[_Row] = []
    reach = 0
    for row in rows:
        if group and row[0] >= reach:
            found += _united(group)
            group = []
        group.append(row)
        reach = max(reach if len(group) > 1 else 0, row[0] + row[3] * (row[2] - 1) + row[1])
    return np.array(found + _united(group), np.uint64)


def _united(group: list[_Row]) -> list[_Row]:
    """Return the union of rows whose hulls overlap, in order."""
    if len(group) == 1:
        return group
    low, (_, _, count, stride) = group[0][0], group[0]
    alike = count > 1 and all(row[2:] == (count, stride) for row in group)
    if alike and max(row[0] + row[1] for row in group) - low <= stride:
        parts = _merged([(row[0], row[0] + row[1]) for row in group])
        if parts == [(low, low + stride)]:
            return [(low, stride * count, 1, 0)]
        if len(parts) == 1:
            return [(low, parts[0][1] - low, count, stride)]
    begins, ends = _joined(*spread(np.array(group, np.uint64)))
    merged = zip(begins.tolist(), (ends - begins).tolist(), strict=True)
    return [(begin, length, 1, 0) for begin, length in merged]


def _joined(
    offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Sort ranges and join those that touch or overlap; return where they begin and end."""
    order = np.argsort(offsets, kind="stable")
    begins, ends = offsets[order], np.maximum.accumulate((offsets + lengths)[order])
    fresh = np.ones(len(begins), bool)
    fresh[1:] = begins[1:] > ends[:-1]
    first = np.flatnonzero(fresh)
    last = np.append(first, len(begins))[1:] - 1
    return begins[first], ends[last]


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort ranges and join those that touch or overlap."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _check_consistency(template: Template) -> None:
    """Check that files, consumers and extents fit each other.  Raises UsageError."""

    def refuse(why: str) -> UsageError:
        return UsageError("the template contradicts itself", why, "Derive or record it anew")

    if not 0 < len(template.files) <= MAX_FILES:
        raise refuse(f"it has {len(template.files)} files; 1 to {MAX_FILES} are possible")
    if not 0 < len(template.consumers) <= MAX_CONSUMERS:
        raise refuse(
            f"it has {len(template.consumers)} consumers; 1 to {MAX_CONSUMERS} are possible"
        )
    if not 1 <= template.tp <= MAX_CONSUMERS:
        raise refuse(f"it is for {template.tp} tensor-parallel ranks")
    extents = template.extents
    if extents.dtype not in (EXTENT, STRIDED) or extents.ndim != 1 or len(extents) > MAX_EXTENTS:
        raise refuse(f"its extents are no list of at most {MAX_EXTENTS:,}")
    paths = [file.path for file in template.files]
    if len(set(paths)) != len(paths):
        raise refuse("it names a file twice")
    for file in template.files:
        parts = Path(file.path).parts
        if not parts or "\0" in file.path or os.path.isabs(file.path) or ".." in parts:
            raise refuse(f"its file {file.path!r} is not below the model's directory")
        if not 0 < file.size <= MAX_SIZE:
            raise refuse(f"its file {file.path!r} has {file.size} bytes")
        inside = file.hashed_from >= 0 and 0 <= file.hashed_bytes <= MAX_HASHED
        if not inside or file.hashed_from + file.hashed_bytes > file.size:
            raise refuse(f"the hashed part of {file.path!r} does not lie in the file")
    if not len(extents):
        return
    if extents["consumer"].max() >= len(template.consumers):
        raise refuse("an extent is of a consumer that there is not")
    if np.any(np.diff(extents["consumer"].astype(np.int64)) < 0):
        raise refuse("its extents are not grouped by consumer")
    if extents["file"].max() >= len(template.files):
        raise refuse("an extent is of a file that there is not")
    sizes = np.array([file.size for file in template.files], np.uint64)[extents["file"]]
    # Written so that nothing can overflow.
    bad = (extents["length"] == 0) | (extents["offset"] >= sizes)
    bad |= extents["length"] > sizes - np.minimum(extents["offset"], sizes)
    if bad.any():
        number = int(np.flatnonzero(bad)[0])
        raise refuse(f"extent {number} does not lie in its file")
    many, apart = counts(extents), strides(extents)
    largest = np.uint64(MAX_SIZE)
    rows = (many > 1) & ((apart < extents["length"]) | (many - 1 > largest // np.maximum(apart, 1)))
    if np.any(rows | (many == 0)):
        raise refuse(f"the rows of extent {int(np.flatnonzero(rows | (many == 0))[0])} overlap")
    room = sizes - extents["offset"] - extents["length"]
    if np.any((many > 1) & ((many - 1) * apart > room)):
        raise refuse("the last row of an extent does not lie in its file")
    if np.any(extents["wanted"] > extents["length"] * many):
        raise refuse("more bytes of an extent are wanted than it has")


def coalesce(extents: Extents, gap: int = 0) -> Extents:
    """Join extents that follow each other both in the order of a consumer and in the file.

    Args:
        extents: an array of EXTENT or STRIDED.
        gap: bytes between two of them that are not worth a seek; they become part of the extent,
            and are not counted as wanted.

    Returns:
        An array of the same kind; of EXTENT where no extent is strided.
    """
    if extents.dtype != EXTENT and not np.any(counts(extents) > 1):
        extents = extents[list(EXTENT.names or ())].astype(EXTENT)
    if len(extents) < 2:
        return extents
    start = extents["offset"].astype(np.int64)
    single = counts(extents) == 1
    end = start + extents["length"].astype(np.int64)
    same = extents["file"][1:] == extents["file"][:-1]
    same &= extents["consumer"][1:] == extents["consumer"][:-1]
    same &= (start[1:] >= end[:-1]) & (start[1:] - end[:-1] <= gap) & single[1:] & single[:-1]
    first = np.flatnonzero(np.concatenate(([True], ~same)))
    last = np.append(first[1:], len(extents)) - 1
    joined: Extents = extents[first]
    several = last > first
    joined["length"][several] = (end[last] - start[first]).astype(np.uint64)[several]
    joined["wanted"] = np.add.reduceat(extents["wanted"], first)
    return joined
