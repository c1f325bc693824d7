# SPDX-License-Identifier: Apache-2.0
"""Which pages of a file are in the cache when it is tagged, as the observer's programs keep it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

from pagecache_bpf.kernel.cachestat import PAGE_SIZE, cached_pages
from pagecache_bpf.observer.count_maps import BITS_PAGES

_WORDS = BITS_PAGES // 8  # bytes of the bits of one kind
_DIGITS = bytes.maketrans(bytes(range(256)), b"01" * 128)  # mincore tells by the lowest bit
_WINDOW = 1 << 30  # bytes asked for at once; a multiple of a block

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def resident_blocks(fd: int) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the blocks of an open file that have resident pages.

    A block is an element of the map `page_bits`.  Pages that are there count as used: nobody
    knows who brought them.  Raises OSError.
    """
    if not cached_pages(fd):
        return
    size = os.fstat(fd).st_size
    for offset in range(0, size, _WINDOW):
        pages = _mincore(fd, offset, min(_WINDOW, size - offset))
        first = offset // PAGE_SIZE // BITS_PAGES
        for at in range(0, len(pages), BITS_PAGES):
            digits = pages[at : at + BITS_PAGES].translate(_DIGITS)
            if b"1" in digits:
                bits = int(digits[::-1], 2).to_bytes(_WORDS, "little")
                yield first + at // BITS_PAGES, bits + bits + bytes(2 * _WORDS + 8)


def _mincore(fd: int, offset: int, length: int) -> bytes:
    address = _libc.mmap(None, length, 0, mmap.MAP_SHARED, fd, offset)
    if address == ctypes.c_void_p(-1).value:
        raise _error()
    try:
        pages = ctypes.create_string_buffer(-(-length // PAGE_SIZE))
        if _libc.mincore(address, length, pages):
            raise _error()
        return pages.raw
    finally:
        _libc.munmap(address, length)


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
