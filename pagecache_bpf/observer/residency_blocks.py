# SPDX-License-Identifier: Apache-2.0
"""Which pages of a file are in the cache when it is tagged, as the observer's programs keep it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE, resident_vector
from pagecache_bpf.observer.count_maps import BITS_PAGES

#: The largest folio, which is mapped as a huge page: MAX_FOLIO_PAGES of observer.bpf.h.
HUGE_PAGES = 512
_WORDS = BITS_PAGES // 8  # bytes of the bits of one kind
_DIGITS = bytes.maketrans(bytes(range(256)), b"01" * 128)  # mincore tells by the lowest bit
_WINDOW = 1 << 30  # bytes asked for at once; a multiple of a block


def may_hold_huge_folio(block: bytes) -> bool:
    """Tell whether a block of resident_blocks() may have a folio of HUGE_PAGES.

    Args:
        block: its contents.

    Returns:
        Whether all pages of an aligned range of that size are resident.
    """
    run = HUGE_PAGES // 8
    return any(block[at : at + run].count(0xFF) == run for at in range(0, _WORDS, run))


def resident_blocks(fd: int) -> Iterator[tuple[int, bytes]]:
    """Look which pages of a file were cached before anybody observed it.

    A block is an element of the map `page_bits`.  Pages that are there count as used: nobody
    knows who brought them.

    Args:
        fd: the open file.

    Yields:
        The number of each block that has resident pages, and its contents for the map.

    Raises:
        OSError: the kernel does not tell.
    """
    if not cached_pages(fd):
        return
    size = os.fstat(fd).st_size
    for offset in range(0, size, _WINDOW):
        pages = resident_vector(fd, offset, min(_WINDOW, size - offset))
        first = offset // PAGE_SIZE // BITS_PAGES
        for at in range(0, len(pages), BITS_PAGES):
            digits = pages[at : at + BITS_PAGES].translate(_DIGITS)
            if b"1" in digits:
                bits = int(digits[::-1], 2).to_bytes(_WORDS, "little")
                yield first + at // BITS_PAGES, bits + bits + bytes(2 * _WORDS + 8)
