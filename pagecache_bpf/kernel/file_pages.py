# SPDX-License-Identifier: Apache-2.0
"""The page size, and mmap(2) and mincore(2) of files by address, which Python's mmap hides.

It knows nothing of BPF: kernel.cachestat asks what is cached, and observer asks what is mapped,
through the one set of prototypes here.  (agent.worker runs without this package and has its own.)
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

#: Bytes of a page of this machine.
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.statx.argtypes = (
    *(ctypes.c_int, ctypes.c_char_p, ctypes.c_int),
    *(ctypes.c_uint, ctypes.c_void_p),
)
# include/uapi/linux/fcntl.h, stat.h: of the descriptor itself, and what the kernel knows already.
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC, _STATX_BASIC = 0x1000, 0x4000, 0x7FF
#: struct statx: user, size, major number of the device, and what lies between them; 256 bytes.
_STATX = struct.Struct("=20xI16xQ88xI116x")


@contextmanager
def mapped(
    fd: int, offset: int, length: int, protection: int = 0, flags: int = mmap.MAP_SHARED
) -> Iterator[int]:
    """Map a range of an open file for as long as the with block runs.

    Args:
        fd: the open file.
        offset: where the range begins, in bytes, at a page boundary.
        length: bytes of the range, more than 0.
        protection: as mmap(2) takes it; 0 (PROT_NONE) maps without access, which is enough for
            mincore(2) and is allowed for every file.
        flags: as mmap(2) takes them.

    Yields:
        The address of the mapping.

    Raises:
        OSError: the kernel refuses to map it.
    """
    address = _libc.mmap(None, length, protection, flags, fd, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise _error()
    try:
        yield address
    finally:
        _libc.munmap(address, length)


def resident_vector(fd: int, offset: int, length: int) -> bytes:
    """Ask mincore(2) which pages of a range of an open file are in the page cache.

    Args:
        fd: the open file.
        offset: where the range begins, in bytes, at a page boundary.
        length: bytes of the range, more than 0.

    Returns:
        One byte a page, whose lowest bit is set if the page is resident.  To callers who could
        not write the file the kernel says that all are (commit 134fca9063ad, Linux 5.2).

    Raises:
        OSError: the kernel refuses.
    """
    pages = ctypes.create_string_buffer(-(-length // PAGE_SIZE))
    with mapped(fd, offset, length) as address:
        if _libc.mincore(address, length, pages):
            raise _error()
    return pages.raw


class KnownStatus(NamedTuple):
    """What the kernel knows of a file.

    Attributes:
        user: number of its owner.
        size: in bytes.
        major: of its device; 0 where that is no block device.
    """

    user: int
    size: int
    major: int


def known_status(fd: int) -> KnownStatus:
    """Return what the kernel knows of an open file, without asking a file system's server.

    Args:
        fd: the open file.

    Returns:
        That, which may be old where the file is on a server.

    Raises:
        OSError: the kernel refuses.
    """
    told = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_BASIC, told):
        raise _error()
    return KnownStatus(*_STATX.unpack(told.raw))


def _error() -> OSError:
    """Make an OSError of the errno that the last call of the C library has left."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
