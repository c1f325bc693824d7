# SPDX-License-Identifier: Apache-2.0
"""What of a file is in the page cache: cachestat(2), or mincore(2) where that is missing.

cachestat(2) (Linux 6.5, commit cf264e1329fb) has no libc wrapper yet and is called by number.
It walks the mapping's own index, so unlike mincore(2) it neither maps the file nor lies to
callers without write permission.  On overlayfs that index is empty, as the pages are a layer's.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from dataclasses import dataclass

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE, known_status, mapped, resident_vector

# The same number on every architecture: system calls since 5.1 share one table.
_SYS_CACHESTAT = 451

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Range(ctypes.Structure):
    """struct cachestat_range of include/uapi/linux/mman.h."""

    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    """struct cachestat of include/uapi/linux/mman.h."""

    _fields_ = (
        ("nr_cache", ctypes.c_uint64),
        ("nr_dirty", ctypes.c_uint64),
        ("nr_writeback", ctypes.c_uint64),
        ("nr_evicted", ctypes.c_uint64),
        ("nr_recently_evicted", ctypes.c_uint64),
    )


_libc.syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_int, ctypes.POINTER(_Range), ctypes.POINTER(_Stat), ctypes.c_uint),
)


@dataclass(frozen=True)
class CacheStat:
    """One answer of cachestat(2), in pages of PAGE_SIZE bytes.

    Attributes:
        cached: pages in the page cache.
        dirty: of these, pages that have to be written.
        writeback: of these, pages that are being written.
        evicted: pages that were in the page cache and left it, as far as the kernel remembers.
        recently_evicted: of these, pages whose refault would show that memory is too small.
    """

    cached: int
    dirty: int
    writeback: int
    evicted: int
    recently_evicted: int


def cachestat(fd: int, offset: int = 0, length: int = 0) -> CacheStat:
    """Ask the kernel for the page-cache state of a byte range of an open file.

    Args:
        fd: the file's descriptor.
        offset: the first byte.
        length: how many bytes; 0 means up to the end of the file.

    Returns:
        Pages by state: cached, dirty, under writeback, evicted and recently evicted.

    Raises:
        UnsupportedError: the kernel or a seccomp profile refuses the call.
        OSError: anything else, such as a bad descriptor or a file of hugetlbfs.

    Where the pages are another file's, as on overlayfs, only those that are cached are told.

    Source: commit cf264e1329fb, Linux 6.5.
    """
    answer = _ask(fd, offset, length)
    return CacheStat(
        answer.nr_cache,
        answer.nr_dirty,
        answer.nr_writeback,
        answer.nr_evicted,
        answer.nr_recently_evicted,
    )


#: To count pages of resident_vector(), which only says something with the lowest bit.
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
#: All of a file: what is asked most, and nobody changes it.
_ALL = _Range(0, 0)


def _ask(fd: int, offset: int, length: int) -> _Stat:
    """Call cachestat(2); raises as cachestat() does."""
    wanted, answer = _Range(offset, length) if offset or length else _ALL, _Stat()
    if _libc.syscall(_SYS_CACHESTAT, fd, wanted, answer, 0) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EPERM):
            raise UnsupportedError(
                "cannot tell what is in the page cache",
                f"cachestat(2) failed: {os.strerror(code)}",
                "It needs Linux 6.5 or newer, ownership of the file or root, and a seccomp "
                "profile that lets it through.",
            )
        raise OSError(code, os.strerror(code))
    if not answer.nr_cache and known_status(fd).major == 0:
        # It looks at the file that was opened.  Without a device of its own that may be one whose
        # pages are another's (overlayfs); a mapping of it has that one's.
        with suppress(OSError):
            answer.nr_cache = mincore(fd, offset, length)
    return answer


def missing_errno() -> int:
    """Find out whether cachestat(2) can be called.

    Returns:
        0 if it can; ENOSYS where the kernel has none, EPERM where a seccomp profile blocks it.
    """
    _libc.syscall(_SYS_CACHESTAT, -1, _ALL, _Stat(), 0)
    code = ctypes.get_errno()
    return code if code in (errno.ENOSYS, errno.EPERM) else 0


def cached_pages(fd: int, start: int = 0, length: int = 0) -> int:
    """Count the pages of a range of an open file that are in the page cache.

    Uses cachestat(2), or mincore(2) where the kernel has only that.

    Args:
        fd: the file's descriptor.
        start: the first byte, at a page boundary.
        length: how many bytes; 0 means up to the end of the file.

    Returns:
        Pages.

    Raises:
        OSError: the kernel refuses the call.
    """
    try:
        return int(_ask(fd, start, length).nr_cache)
    except UnsupportedError:
        return mincore(fd, start, length)


def resident_pages_or_none(fd: int) -> int | None:
    """Count the pages of an open file in the page cache, if the kernel tells this caller.

    It tells the file's owner, root and whoever may write the file; mincore(2) tells others that all
    of it is there.

    Args:
        fd: the file's descriptor.

    Returns:
        Pages; None for a caller whom the kernel does not tell.

    Source: commit 134fca9063ad, Linux 5.2.
    """
    try:
        return int(_ask(fd, 0, 0).nr_cache)
    except (UnsupportedError, OSError):
        pass
    if os.geteuid() not in (0, known_status(fd).user):
        return None
    with suppress(OSError):
        return mincore(fd)
    return None


def mincore(fd: int, start: int = 0, length: int = 0) -> int:
    """Count the pages of a range in the page cache as kernels before 6.5 tell it, slower.

    The call is mincore(2).

    Args:
        fd: the open file.
        start: where the range begins, in bytes, at a page boundary.
        length: bytes of the range; 0: up to the end of the file.

    Returns:
        Pages of PAGE_SIZE bytes; all of them for a file that the caller could not write.

    Raises:
        OSError: the kernel refuses.
    """
    length = length or max(0, known_status(fd).size - start)
    if not length:
        return 0
    return resident_vector(fd, start, length).translate(_LOWEST_BIT).count(1)


def has_page_cache(fd: int) -> bool:
    """Tell whether an open file has pages in the page cache that can be read ahead.

    Only such files have a shared mapping.  Python's mmap module cannot ask: it refuses empty files
    by itself, and those of procfs look empty.

    Args:
        fd: the file's descriptor.

    Returns:
        False for pipes, devices, and files of procfs and sysfs.
    """
    try:
        with mapped(fd, 0, PAGE_SIZE):
            return True
    except OSError:
        return False
