# SPDX-License-Identifier: Apache-2.0
"""What of a file is in the page cache: cachestat(2), or mincore(2) where that is missing.

cachestat(2) (Linux 6.5, commit cf264e1329fb) has no libc wrapper yet and is called by number.
It walks the mapping's own index, so unlike mincore(2) it neither maps the file nor lies to
callers without write permission.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from dataclasses import dataclass

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE, mapped, resident_vector

# The same number on every architecture: system calls since 5.1 share one table.
_SYS_CACHESTAT = 451

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = (
        ("nr_cache", ctypes.c_uint64),
        ("nr_dirty", ctypes.c_uint64),
        ("nr_writeback", ctypes.c_uint64),
        ("nr_evicted", ctypes.c_uint64),
        ("nr_recently_evicted", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class CacheStat:
    """One answer of cachestat(2), in pages of PAGE_SIZE bytes."""

    cached: int
    dirty: int
    writeback: int
    evicted: int
    recently_evicted: int


def cachestat(fd: int, offset: int = 0, length: int = 0) -> CacheStat:
    """Page-cache state of a byte range of an open file; length 0 means up to the end.

    Raises UnsupportedError where the kernel or a seccomp profile refuses the call, OSError
    for anything else (a bad descriptor, a hugetlb file).
    """
    wanted, answer = _Range(offset, length), _Stat()
    rc = _libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT),
        ctypes.c_int(fd),
        ctypes.byref(wanted),
        ctypes.byref(answer),
        ctypes.c_uint(0),
    )
    if rc != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EPERM):
            raise UnsupportedError(
                "cannot tell what is in the page cache",
                f"cachestat(2) failed: {os.strerror(code)}",
                "It needs Linux 6.5 or newer, ownership of the file or root, and a seccomp "
                "profile that lets it through.",
            )
        raise OSError(code, os.strerror(code))
    return CacheStat(
        answer.nr_cache,
        answer.nr_dirty,
        answer.nr_writeback,
        answer.nr_evicted,
        answer.nr_recently_evicted,
    )


def cached_pages(fd: int, start: int = 0, length: int = 0) -> int:
    """Pages of a range of an open file in the page cache, by whatever this kernel offers.

    start, length: bytes, from a page boundary; length 0 means up to the end.  Raises OSError.
    """
    try:
        return cachestat(fd, start, length).cached
    except UnsupportedError:
        return mincore(fd, start, length)


def resident_pages_or_none(fd: int) -> int | None:
    """Pages of an open file in the page cache; None for a caller whom the kernel does not tell.

    It tells the owner, root and whoever may write the file; mincore(2) tells others that all
    of it is there (commit 134fca9063ad, Linux 5.2).
    """
    with suppress(UnsupportedError, OSError):
        return cachestat(fd).cached
    if os.geteuid() not in (0, os.fstat(fd).st_uid):
        return None
    with suppress(OSError):
        return mincore(fd)
    return None


def mincore(fd: int, start: int = 0, length: int = 0) -> int:
    """Count the pages of a range in the page cache by mincore(2), which is slower.

    Args:
        fd: the open file.
        start: where the range begins, in bytes, at a page boundary.
        length: bytes of the range; 0: up to the end of the file.

    Returns:
        Pages of PAGE_SIZE bytes; all of them for a file that the caller could not write.

    Raises:
        OSError: the kernel refuses.
    """
    length = length or max(0, os.fstat(fd).st_size - start)
    if not length:
        return 0
    return sum(page & 1 for page in resident_vector(fd, start, length))


def has_page_cache(fd: int) -> bool:
    """Return whether an open file has pages in the page cache that can be read ahead.

    Only such files have a shared mapping.  Python's mmap module cannot ask: it refuses empty files
    by itself, and those of procfs look empty.
    """
    try:
        with mapped(fd, 0, PAGE_SIZE):
            return True
    except OSError:
        return False
