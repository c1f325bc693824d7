# SPDX-License-Identifier: Apache-2.0
"""How much of a model is in the page cache now, by file and by tensor.

The kernel tells the owner of a file, whoever may write it, and root: by cachestat(2) since Linux
6.5, by mincore(2) before, which claims to others that all of it is there.  For those it stays
unknown.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.kernel.cachestat import cached_pages, resident_pages_or_none
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.weights.models import Model

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW


class Resident(NamedTuple):
    """A file or a tensor: its bytes, and those in the page cache; None if that is not told.

    Whole pages are counted, so that a page which two tensors share counts for both.
    """

    name: str
    bytes: int
    resident_bytes: int | None


@dataclass(frozen=True)
class ModelResidency:
    """What was in the page cache when the kernel was asked, at time_ns (since 1970).

    files: in the model's order, by the names that people see.  tensors: where they were asked for,
    in the order of the files and of their offsets.  why: of a file whose tensors are not known.
    """

    time_ns: int
    files: tuple[Resident, ...]
    tensors: tuple[Resident, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def resident_bytes(self) -> int | None:
        """Bytes of them in the page cache; None if that is not told of one of them."""
        counts = [file.resident_bytes for file in self.files]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def fraction(self) -> float | None:
        """Share of the model that is in the page cache, from 0 to 1; None if it is not told."""
        resident = self.resident_bytes
        return None if resident is None else resident / self.bytes if self.bytes else 0.0


def look(
    model: Model,
    tensors: bool = False,
    ask: Callable[[Path], int | None] = lambda path: None,
) -> ModelResidency:
    """Ask the kernel what of a model is in the page cache.

    Args:
        model: its files are opened, and none of their pages is read but for headers.
        tensors: whether to ask for each tensor, too, which reads the headers.
        ask: what is asked for a file of which the kernel tells this user nothing.

    Returns:
        Bytes and resident bytes of the model, of each file and, if asked for, of each tensor; what
        the kernel does not tell this user is None, and a note says why.

    Raises:
        UsageError: a file cannot be opened.
        PrivilegeError: this user may not open a file.
    """
    began = time.time_ns()
    files: list[Resident] = []
    parts: list[Resident] = []
    why: list[str] = []
    for path, name in zip(model.files, model.names, strict=True):
        fd, size = _opened(path)
        try:
            pages = resident_pages_or_none(fd)
            if pages is None:
                known = ask(path)
            else:
                known = pages * PAGE_SIZE
                if known > size:  # the last page is not full
                    known = size
            files.append(Resident(name, size, known))
            if tensors:
                try:
                    parts += _tensors(fd, path, pages is not None)
                except PagecacheError as error:
                    why.append(f"{name}: {error.why or error.what}")
        finally:
            os.close(fd)
    return ModelResidency(began, tuple(files), tuple(parts), tuple(why))


def _opened(path: Path) -> tuple[int, int]:
    """Open a model's file, by the path that it really has, and return its size, too.

    One call of open(2) is enough for that: the file was looked at when the model was resolved, and
    nothing that has taken its place since is followed, waited for, or read.
    """
    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        fd = open_to_read(path)  # which says what is wrong
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise UsageError(f"{path} is not a regular file", "it was one when it was looked for")
    return fd, status.st_size


def _tensors(fd: int, path: Path, told: bool) -> list[Resident]:
    """Return the tensors of an open file in the order of their offsets."""
    from pagecache_bpf.weights import headers  # brings numpy, which a summary needs not

    contents = headers.parse_open(fd, path)
    found = []
    for number in contents.offsets.argsort(kind="stable").tolist():
        offset, length = int(contents.offsets[number]), int(contents.lengths[number])
        resident: int | None = None
        if told and length:
            start = offset // PAGE_SIZE * PAGE_SIZE
            pages = cached_pages(fd, start, offset + length - start)
            resident = min(pages * PAGE_SIZE, length)
        elif told:
            resident = 0
        found.append(Resident(contents.names[number], length, resident))
    return found
