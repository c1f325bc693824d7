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

# The same number on every architecture: system calls since 5.1 share one table.
_SYS_CACHESTAT = 451
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_PROT_NONE, _MAP_SHARED = 0, 1


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
    """The same by mincore(2): slower, and all pages for files that the caller could not write.

    Raises OSError.
    """
    length = length or max(0, os.fstat(fd).st_size - start)
    if not length:
        return 0
    address = _libc.mmap(None, length, _PROT_NONE, _MAP_SHARED, fd, start)
    if address == ctypes.c_void_p(-1).value:
        raise _error()
    try:
        pages = (ctypes.c_ubyte * ((length + PAGE_SIZE - 1) // PAGE_SIZE))()
        if _libc.mincore(address, length, pages):
            raise _error()
        return sum(page & 1 for page in pages)
    finally:
        _libc.munmap(address, length)


def has_page_cache(fd: int) -> bool:
    """Return whether an open file has pages in the page cache that can be read ahead.

    Only such files have a shared mapping.  Python's mmap module cannot ask: it refuses empty files
    by itself, and those of procfs look empty.
    """
    address = _libc.mmap(None, PAGE_SIZE, _PROT_NONE, _MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        return False
    _libc.munmap(address, PAGE_SIZE)
    return True


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
