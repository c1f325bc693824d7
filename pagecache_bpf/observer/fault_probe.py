# SPDX-License-Identifier: Apache-2.0
"""Probe of the running kernel: whether a page fault maps a large folio whole.

The observer needs to know it to count accesses through mappings; no file of the kernel tells it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

from pagecache_bpf.kernel.file_pages import PAGE_SIZE, mapped
from pagecache_bpf.kernel.kernelfs import LIVE

_BYTES = 4 << 20
_HUGE = 2 << 20
_PLACES = ("/var/tmp", "/tmp")
_PRESENT = 1 << 63  # bit of /proc/PID/pagemap
_WINDOW = "/sys/kernel/debug/fault_around_bytes"


def maps_whole_folios() -> bool:
    """Probe whether a fault maps a large folio whole, beyond the window around the fault (6.18).

    No tracepoint tells how far.  Large folios are made by reading a small file that readahead
    follows, where a file system at hand makes any.

    Returns:
        Whether it does; False where that cannot be found out.
    """
    text = LIVE.read(_WINDOW) or ""
    window = int(text) if text.isdigit() else 64 << 10
    for directory in _PLACES:
        try:
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                _fill(file.fileno())
                # Readahead makes folios of many sizes; a huge one is mapped whole by any kernel.
                for place in range(0, _BYTES, 128 << 10):
                    if window < _mapped_by_one_touch(file.fileno(), place) < _HUGE:
                        return True
        except OSError:
            continue
    return False


def _fill(fd: int) -> None:
    os.write(fd, bytes(_BYTES))
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(fd, 0, os.SEEK_SET)
    while os.read(fd, 128 << 10):
        pass


def _mapped_by_one_touch(fd: int, place: int) -> int:
    """Touch a new mapping once and count the bytes of it that are in the page table then."""
    with (
        mapped(fd, 0, _BYTES, mmap.PROT_READ, mmap.MAP_PRIVATE) as address,
        LIVE.path("/proc/self/pagemap").open("rb", buffering=0) as table,
    ):
        ctypes.string_at(address + place, 1)
        raw = os.pread(table.fileno(), 8 * _BYTES // PAGE_SIZE, address // PAGE_SIZE * 8)
    entries = memoryview(raw).cast("Q")
    return sum(bool(entry & _PRESENT) for entry in entries) * PAGE_SIZE
