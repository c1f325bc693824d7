# SPDX-License-Identifier: Apache-2.0
"""Probe of the running kernel: whether a page fault maps a large folio whole.

The observer needs to know it to count accesses through mappings; no file of the kernel tells it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from pagecache_bpf.kernel.file_pages import PAGE_SIZE, mapped
from pagecache_bpf.kernel.kernelfs import LIVE

_BYTES = 4 << 20
_HUGE = 2 << 20
_PLACES = ("/var/tmp", "/tmp")
_PRESENT = 1 << 63  # bit of /proc/PID/pagemap
_WINDOW = "/sys/kernel/debug/fault_around_bytes"
#: Of a file in memory: less than a huge page, which any kernel maps whole.
_MEMORY_BYTES = 256 << 10
# Numbers of system calls, the same on all architectures, and include/uapi/linux/mount.h.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _SET_STRING, _CREATE = 1, 1, 6
_libc = ctypes.CDLL(None, use_errno=True)


def maps_whole_folios() -> bool:
    """Probe whether a fault maps a large folio whole, beyond the window around the fault (6.18).

    No tracepoint tells how far.  Large folios are had in memory (tmpfs makes them since 6.14), so
    that it does not matter which file systems are at hand; else by reading a small file that
    readahead follows, where a file system at hand makes any.

    Returns:
        Whether it does; False where that cannot be found out.
    """
    text = LIVE.read(_WINDOW) or ""
    window = int(text) if text.isdigit() else 64 << 10
    with suppress(OSError), _file_in_memory() as fd:
        if _mapped_by_one_touch(fd, 0) > window:
            return True
        # A folio that two page tables share is not mapped whole: the same at another place.
        with mapped(fd, 0, _MEMORY_BYTES):
            if _mapped_by_one_touch(fd, 0) > window:
                return True
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


@contextmanager
def _file_in_memory() -> Iterator[int]:
    """Make a file of one large folio in a tmpfs that is mounted nowhere; for root.

    Yields:
        Its descriptor.

    Raises:
        OSError: this user may not mount, or the kernel makes no huge pages of such files.
    """
    with ExitStack() as opened:

        def keep(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        context = keep(_call(_FSOPEN, b"tmpfs", _CLOEXEC))
        _call(_FSCONFIG, context, _SET_STRING, b"huge", b"within_size", 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        root = keep(_call(_FSMOUNT, context, _CLOEXEC, 0))
        file = keep(os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=root))
        os.ftruncate(file, _MEMORY_BYTES)
        os.pwrite(file, bytes(_MEMORY_BYTES), 0)
        yield file


def _call(number: int, *arguments: object) -> int:
    """Make a system call that the C library may not have; raises OSError where it fails."""
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _fill(fd: int) -> None:
    os.write(fd, bytes(_BYTES))
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(fd, 0, os.SEEK_SET)
    while os.read(fd, 128 << 10):
        pass


def _mapped_by_one_touch(fd: int, place: int) -> int:
    """Touch a new mapping once and count the bytes of it that are in the page table then."""
    size = os.fstat(fd).st_size
    with (
        mapped(fd, 0, size, mmap.PROT_READ, mmap.MAP_PRIVATE) as address,
        LIVE.path("/proc/self/pagemap").open("rb", buffering=0) as table,
    ):
        ctypes.string_at(address + place, 1)
        raw = os.pread(table.fileno(), 8 * size // PAGE_SIZE, address // PAGE_SIZE * 8)
    entries = memoryview(raw).cast("Q")
    return sum(bool(entry & _PRESENT) for entry in entries) * PAGE_SIZE
