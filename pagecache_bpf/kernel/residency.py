# SPDX-License-Identifier: Apache-2.0
"""Which parts of an open file are in the page cache, and dropping the other parts again.

It knows descriptors and bytes; whose load a file belongs to is known by those who call it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.cachestat import CacheStat, cachestat, mincore
from pagecache_bpf.kernel.file_key import may_write
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

#: Bytes of one part of a file that is looked at, kept and dropped as a whole.
CHUNK = 2 << 20
#: Bytes that the kernel is asked about at a time at first; twice as many where nothing is cached.
PIECE = 64 << 20


def resident_bytes(fd: int, start: int = 0, length: int = 0) -> int | None:
    """Count the bytes of a range of an open file that are in the page cache.

    Args:
        fd: the file, open for reading.
        start: offset of the range in bytes.
        length: its length in bytes; 0: up to the end of the file.

    Returns:
        Bytes, in whole pages but never more than the range has; None if this user may not know:
        the kernel tells owners, those who may write the file, and root.

    Source: cachestat(2), kernel commit cf264e1329fb (Linux 6.5); mincore(2) before it.
    """
    try:
        found: CacheStat | int = cachestat(fd, start, length)
    except UnsupportedError:
        status = os.fstat(fd)
        if os.geteuid() not in (0, status.st_uid) and not may_write(fd):
            return None  # mincore(2) would say that everything is there
        try:
            found = mincore(fd, start, length)
        except OSError:
            return None
    except OSError:
        return None
    there = max(0, os.fstat(fd).st_size - start)
    pages = found if isinstance(found, int) else found.cached
    return min(pages * PAGE_SIZE, min(length, there) if length else there)


@dataclass(frozen=True)
class CachedChunks:
    """What of a file was in the page cache at one moment, by chunks of CHUNK bytes.

    Attributes:
        resident: bytes that were there, in whole pages.
        numbers: numbers of the chunks of which at least half was there; None: all of them.
        known: whether this user may know; if not, numbers is None.
    """

    resident: int
    numbers: frozenset[int] | None
    known: bool = True

    @classmethod
    def of(cls, fd: int) -> CachedChunks:
        """Ask the kernel which chunks of an open file are in the page cache.

        Args:
            fd: the file's descriptor.

        Returns:
            The chunks, as they were at this moment.

        Raises:
            OSError: the descriptor is none.
        """
        look = ChunkLook(fd)
        look.go_on(fd)
        return look.result()

    def has(self, offset: int) -> bool:
        """Tell whether a chunk was in the page cache.

        Args:
            offset: a byte of the chunk.

        Returns:
            True also where it is not known.
        """
        return self.numbers is None or offset // CHUNK in self.numbers

    def drop_others(self, fd: int) -> int:
        """Drop what was not there from the page cache, as far as it is clean and not mapped.

        Args:
            fd: the same file, open for reading.

        Returns:
            Bytes that went.

        Raises:
            OSError: the file system refused it.
        """
        if self.numbers is None:
            return 0
        before = resident_bytes(fd) or 0
        for start, length in self._gaps(self.numbers, os.fstat(fd).st_size):
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
        return max(0, before - (resident_bytes(fd) or 0))

    @staticmethod
    def _gaps(numbers: frozenset[int], size: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges between these chunks, as offset and length in bytes."""
        start = 0
        for number in [*sorted(numbers), (size + CHUNK - 1) // CHUNK]:
            if number * CHUNK > start:
                yield start, min(number * CHUNK, size) - start
            start = (number + 1) * CHUNK


class ChunkLook:
    """A look at which chunks of a file are in the page cache, piece by piece from its front.

    The kernel walks what is cached to answer: milliseconds a GiB that is cached in small folios.
    Each piece is walked once, and once more by chunks if a part of it is cached.

    Args:
        fd: the file, open for reading.
    """

    def __init__(self, fd: int) -> None:
        self._size = os.fstat(fd).st_size
        self._at = 0
        self._piece = PIECE
        self._resident = 0
        self._chunks: set[int] = set()
        self._known = True

    def go_on(self, fd: int, until: float | None = None) -> bool:
        """Look at the pieces that come next.

        Args:
            fd: the same file, open for reading.
            until: when to stop, as time.monotonic() tells; None: at the end of the file.

        Returns:
            Whether the whole file has been looked at.
        """
        while self._at < self._size:
            if until is not None and time.monotonic() >= until:
                return False
            length = min(self._piece, self._size - self._at)
            found = resident_bytes(fd, self._at, length)
            if found is None:
                self._known, self._at = False, self._size
                break
            self._resident += found
            self._note(fd, length, found)
            self._at += length
            self._piece = PIECE if found else 2 * self._piece
        return True

    def _note(self, fd: int, length: int, found: int) -> None:
        """Note the chunks of a piece of which so many bytes are cached."""
        numbers = range(self._at // CHUNK, (self._at + length + CHUNK - 1) // CHUNK)
        if found >= length:
            self._chunks.update(numbers)
        elif found:
            for number in numbers:
                part = min(CHUNK, self._size - number * CHUNK)
                if 2 * (resident_bytes(fd, number * CHUNK, CHUNK) or 0) >= part:
                    self._chunks.add(number)

    def result(self) -> CachedChunks:
        """Tell what has been found.

        Returns:
            The chunks; of a file that has not been looked at wholly, those of its front.
        """
        if not self._known:
            return CachedChunks(0, None, known=False)
        if self._resident >= self._size > 0:
            return CachedChunks(self._resident, None)
        return CachedChunks(self._resident, frozenset(self._chunks))
