# SPDX-License-Identifier: Apache-2.0
"""What a template is, and whether it fits the files at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.units import format_size, plural
from pagecache_bpf.weights.identity import MAX_HASHED, TemplateFile, identify
from pagecache_bpf.weights.models import Model

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
    """Extents in the order of each consumer, grouped by consumer.

    source: derived, recorded or imported.  loader: whose order it is.  tp: tensor-parallel
    ranks of the load, 1 without.  extents: an array of EXTENT, or of STRIDED where some are slices
    of rows; plain() has them one by one.
    Raises UsageError when it contradicts itself.
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
        return sum(
            length * count
            for number in np.unique(self.extents["file"])
            for _, length, count, _ in union(self.extents[self.extents["file"] == number])
        )

    def ranges(
        self,
    ) -> list[tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
        """Return for each file with extents: its number, starts and ends of what is covered."""
        found = []
        for number in np.unique(self.extents["file"]):
            rows = union(self.extents[self.extents["file"] == number])
            offsets, lengths = spread(np.array(rows, np.uint64).reshape(-1, 4))
            ends = offsets + lengths
            fresh = np.ones(len(offsets), bool)
            fresh[1:] = offsets[1:] > ends[:-1]
            first = np.flatnonzero(fresh)
            last = np.append(first[1:], len(offsets)) - 1
            found.append((int(number), offsets[first], ends[last]))
        return found

    def plain(self, consumer: int | None = None) -> Extents:
        """Return the extents one by one, of dtype EXTENT: a strided one becomes many.

        Args:
            consumer: the number of one of the consumers; by default all of them.
        """
        chosen = self.extents
        if consumer is not None:
            chosen = chosen[chosen["consumer"] == consumer]
        return expanded(chosen)

    def of(self, consumer: int) -> Extents:
        """Return the extents of one consumer, one by one and in its order."""
        return self.plain(consumer)


def counts(extents: Extents) -> npt.NDArray[np.uint64]:
    """Return of how many ranges each extent consists."""
    if "count" in (extents.dtype.names or ()):
        found: npt.NDArray[np.uint64] = extents["count"]
        return found
    return np.ones(len(extents), np.uint64)


def strides(extents: Extents) -> npt.NDArray[np.uint64]:
    """Return how far apart the ranges of each extent are, in bytes; 0 for a single one."""
    if "stride" in (extents.dtype.names or ()):
        found: npt.NDArray[np.uint64] = extents["stride"]
        return found
    return np.zeros(len(extents), np.uint64)


def expanded(extents: Extents) -> Extents:
    """Return extents of dtype EXTENT, each a single range.

    The wanted bytes of a strided extent are shared evenly among its ranges.
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
    """Return offsets and lengths of all ranges of rows of (offset, length, count, stride)."""
    many = rows[:, 2].astype(np.int64)
    number = (np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)).astype(
        np.uint64
    )
    offsets = np.repeat(rows[:, 0], many) + np.repeat(rows[:, 3], many) * number
    return offsets, np.repeat(rows[:, 1], many)


_Row = tuple[int, int, int, int]  # offset, length, count, stride


def union(extents: Extents) -> list[_Row]:
    """Return what extents of one file cover, as disjoint rows in order.

    Slices of the same rows are united by arithmetic on one row, without a list of all rows.

    Returns:
        Rows (offset, length, count, stride), in bytes; the last row of one ends before the next
        one begins.
    """
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
    return found + (_united(group) if group else [])


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
    offsets, lengths = spread(np.array(group, np.uint64))
    order = np.argsort(offsets, kind="stable")
    begins, ends = offsets[order], np.maximum.accumulate((offsets + lengths)[order])
    fresh = np.ones(len(begins), bool)
    fresh[1:] = begins[1:] > ends[:-1]
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], len(begins)) - 1
    merged = zip(begins[first].tolist(), (ends[last] - begins[first]).tolist(), strict=True)
    return [(begin, length, 1, 0) for begin, length in merged]


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in their order with those made one that touch or overlap."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _check_consistency(template: Template) -> None:
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
    """Join neighbours in the order of one consumer that are neighbours in the file, too.

    gap: bytes between two of them that are not worth a seek; they become part of the extent,
    and are not counted as wanted.
    """
    if not np.any(counts(extents) > 1):
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
    joined: Extents = extents[first].copy()
    several = last > first
    joined["length"][several] = (end[last] - start[first]).astype(np.uint64)[several]
    joined["wanted"] = np.add.reduceat(extents["wanted"], first)
    return joined


# Identity.


@dataclass(frozen=True)
class Mismatch:
    """A file that is not what a template was made for, and in what it differs."""

    path: str
    why: str


@dataclass(frozen=True)
class Fit:
    """How a template fits files: paths of those that do, and what is wrong with the others.

    fitting_bytes, total_bytes: of the template's extents.
    """

    paths: dict[int, Path] = field(default_factory=dict)
    mismatches: tuple[Mismatch, ...] = ()
    fitting_bytes: int = 0
    total_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Whether every file is the one that the template was made for."""
        return not self.mismatches


def locate(template: Template, where: Path | Model) -> list[Path]:
    """Return where the files of a template are, in the template's order.

    Args:
        template: its files have names below a model's directory.
        where: a model, whose files are taken by the names that people see; or a directory, or the
            one file of a template of one.

    Returns:
        A path for each file of the template, whether there is such a file or not.
    """
    if isinstance(where, Model):
        if len(template.files) == len(where.files) == 1:
            return [where.files[0]]
        known = dict(zip(where.names, where.files, strict=True))
        by_name = {Path(name).name: path for name, path in known.items()}
        return [
            known.get(file.path) or by_name.get(Path(file.path).name) or where.directory / file.path
            for file in template.files
        ]
    if where.is_file():
        if len(template.files) == 1:
            return [where]
        where = where.parent
    return [where / file.path for file in template.files]


def check(template: Template, where: Path | Model) -> Fit:
    """Compare a template with files, by their sizes and headers.

    Args:
        template: the template.
        where: see locate().

    Raises:
        PrivilegeError: a file may not be read.
    """
    paths: dict[int, Path] = {}
    mismatches = []
    for number, (file, path) in enumerate(
        zip(template.files, locate(template, where), strict=True)
    ):
        why = _difference(file, path)
        if why:
            mismatches.append(Mismatch(file.path, why))
        else:
            paths[number] = path
    extents = template.extents
    fits = np.isin(extents["file"], np.array(sorted(paths), np.uint32))
    fitting = (extents["length"] * counts(extents))[fits]
    return Fit(paths, tuple(mismatches), int(fitting.sum()), template.length)


def _difference(expected: TemplateFile, path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise PrivilegeError(
            f"{path} cannot be opened", "permission denied", "Run as a user who may read the file"
        ) from error
    except OSError as error:
        return error.strerror or str(error)
    try:
        size = os.fstat(fd).st_size
        if size != expected.size:
            return f"it has {size:,} bytes, not {expected.size:,}"
        digest = identify(fd, size, expected.hashed_from, expected.hashed_bytes)
    except OSError as error:
        return error.strerror or str(error)
    except EOFError:
        return "it ends early"
    finally:
        os.close(fd)
    return "" if digest == expected.digest else "its header is another one"


def require_fit(template: Template, fit: Fit, what: str, partial: bool = False) -> Template:
    """The template, or with `partial` what of it fits.  what: the template's name for people.

    Raises UsageError with the differences when it does not fit (partial: at all).
    """
    if fit.whole:
        return template
    first = "; ".join(f"{mismatch.path}: {mismatch.why}" for mismatch in fit.mismatches[:3])
    if len(fit.mismatches) > 3:
        first += f"; and {plural(len(fit.mismatches) - 3, 'more file')}"
    share = f"{format_size(fit.fitting_bytes)} of {format_size(fit.total_bytes)} fit"
    if not partial or not fit.paths:
        raise PagecacheError(
            f"{what} does not fit the files",
            f"{first} ({share})",
            "Derive or record a template of these files",
            f"{_DOCS}#does-not-fit-the-files",
        )
    keep = np.isin(template.extents["file"], np.array(sorted(fit.paths), np.uint32))
    return Template(
        template.files,
        template.consumers,
        template.extents[keep],
        template.source,
        template.loader,
        template.tp,
    )
