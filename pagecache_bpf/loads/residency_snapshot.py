# SPDX-License-Identifier: Apache-2.0
"""What of some files was in the page cache when a load began: its end leaves just that."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.cachestat import CacheStat, cachestat, mincore
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

CHUNK = 2 << 20


def resident_bytes(fd: int, start: int = 0, length: int = 0) -> int | None:
    """Bytes of a range of an open file in the page cache; None if this user may not know.

    Whole pages are counted.  The kernel tells owners, those who may write, and root.
    """
    try:
        found: CacheStat | int = cachestat(fd, start, length)
    except UnsupportedError:
        status = os.fstat(fd)
        if os.geteuid() not in (0, status.st_uid) and not os.access(f"/proc/self/fd/{fd}", os.W_OK):
            return None  # mincore(2) would say that everything is there
        try:
            found = mincore(fd, start, length)
        except OSError:
            return None
    except OSError:
        return None
    return (found if isinstance(found, int) else found.cached) * PAGE_SIZE


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The file, open for reading.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def resident_of(paths: Sequence[Path]) -> int | None:
    """Bytes of several files in the page cache; None if it is not known of one of them."""
    total = 0
    for path in paths:
        try:
            with opened(path) as fd:
                found = resident_bytes(fd)
        except OSError:
            continue  # gone: nothing of it is reachable by that name
        if found is None:
            return None
        total += found
    return total


class Snapshot:
    """By chunks of CHUNK bytes, what was there; known: whether this user may know at all."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self.known = True
        self.resident = 0
        # A shared lock on the first file tells the loads of other processes (the ranks of one
        # model) that this one is under way; nobody needs to be asked, and it ends with us.
        self._claim = -1
        with suppress(OSError):
            self._claim = os.open(paths[0], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            fcntl.flock(self._claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
        #: Numbers of the chunks that were there, by file; None: all of them.
        self._there: list[frozenset[int] | None] = []
        for path in paths:
            self._there.append(self._look(path))

    def _look(self, path: Path) -> frozenset[int] | None:
        try:
            with opened(path) as fd:
                found, size = resident_bytes(fd), os.fstat(fd).st_size
                if found is None:
                    self.known = False
                    return None
                self.resident += found
                if found == 0:
                    return frozenset()
                if found >= size:
                    return None
                return frozenset(
                    at // CHUNK
                    for at in range(0, size, CHUNK)
                    if 2 * (resident_bytes(fd, at, CHUNK) or 0) >= min(CHUNK, size - at)
                )
        except OSError:
            return None

    def was_there(self, file: int, offset: int) -> bool:
        """Whether most of the chunk with that offset was; True where it is not known."""
        there = self._there[file]
        return there is None or offset // CHUNK in there

    def others(self) -> bool:
        """Whether another process has a load of these files open."""
        if self._claim < 0:
            return False
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Let go of the claim."""
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def drop_rest(self) -> int | None:
        """Drop what was not there, as far as nobody maps it; bytes that went, None if unknown.

        Nothing while another process's load needs it: the last one drops.
        """
        if not self.known:
            return None
        if self.others():
            return 0
        dropped = 0
        for path, there in zip(self._paths, self._there, strict=True):
            if there is None:
                continue
            with suppress(OSError), opened(path) as fd:
                before = resident_bytes(fd) or 0
                for start, length in _gaps(there, os.fstat(fd).st_size):
                    os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
                dropped += max(0, before - (resident_bytes(fd) or 0))
        return dropped


def _gaps(there: frozenset[int], size: int) -> Iterator[tuple[int, int]]:
    """Ranges between the chunks in THERE, in bytes."""
    start = 0
    for number in [*sorted(there), (size + CHUNK - 1) // CHUNK]:
        if number * CHUNK > start:
            yield start, min(number * CHUNK, size) - start
        start = (number + 1) * CHUNK
