# SPDX-License-Identifier: Apache-2.0
"""Which parts of an open file are in the page cache, and dropping the other parts again.

It knows descriptors and bytes; whose load a file belongs to is known by those who call it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.cachestat import CacheStat, cachestat, mincore
from pagecache_bpf.kernel.file_key import may_write
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

#: Bytes of one part of a file that is looked at, kept and dropped as a whole.
CHUNK = 2 << 20


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
        found, size = resident_bytes(fd), os.fstat(fd).st_size
        if found is None:
            return cls(0, None, known=False)
        if found == 0:
            return cls(0, frozenset())
        if found >= size:
            return cls(found, None)
        there = frozenset(
            start // CHUNK
            for start in range(0, size, CHUNK)
            if 2 * (resident_bytes(fd, start, CHUNK) or 0) >= min(CHUNK, size - start)
        )
        return cls(found, there)

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
