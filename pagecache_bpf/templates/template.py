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
#: An array of EXTENT.  numpy has no type for the fields of one.
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
    ranks of the load, 1 without.  extents: an array of EXTENT.
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
        return int(self.extents["length"].sum())

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
        return sum(int((ends - starts).sum()) for _, starts, ends in self.ranges())

    def ranges(
        self,
    ) -> list[tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
        """For each file with extents: its number, starts and ends of what is covered, merged."""
        found = []
        order = np.lexsort((self.extents["offset"], self.extents["file"]))
        ordered = self.extents[order]
        cuts = np.flatnonzero(np.diff(ordered["file"])) + 1
        for part in np.split(ordered, cuts):
            if not len(part):
                continue
            ends = np.maximum.accumulate(part["offset"] + part["length"])
            fresh = np.ones(len(part), bool)
            fresh[1:] = part["offset"][1:] > ends[:-1]
            first = np.flatnonzero(fresh)
            last = np.append(first[1:], len(part)) - 1
            found.append((int(part["file"][0]), part["offset"][first], ends[last]))
        return found

    def of(self, consumer: int) -> Extents:
        """The extents of one consumer, in its order."""
        found: Extents = self.extents[self.extents["consumer"] == consumer]
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
    if extents.dtype != EXTENT or extents.ndim != 1 or len(extents) > MAX_EXTENTS:
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
    if np.any(extents["wanted"] > extents["length"]):
        raise refuse("more bytes of an extent are wanted than it has")


def coalesce(extents: Extents, gap: int = 0) -> Extents:
    """Join neighbours in the order of one consumer that are neighbours in the file, too.

    gap: bytes between two of them that are not worth a seek; they become part of the extent,
    and are not counted as wanted.
    """
    if len(extents) < 2:
        return extents
    start = extents["offset"].astype(np.int64)
    end = start + extents["length"].astype(np.int64)
    same = extents["file"][1:] == extents["file"][:-1]
    same &= extents["consumer"][1:] == extents["consumer"][:-1]
    same &= (start[1:] >= end[:-1]) & (start[1:] - end[:-1] <= gap)
    first = np.flatnonzero(np.concatenate(([True], ~same)))
    last = np.append(first[1:], len(extents)) - 1
    joined: Extents = extents[first].copy()
    joined["length"] = (end[last] - start[first]).astype(np.uint64)
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
    return Fit(paths, tuple(mismatches), int(extents["length"][fits].sum()), template.length)


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
