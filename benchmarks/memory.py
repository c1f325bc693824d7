# SPDX-License-Identifier: Apache-2.0
"""The memory that a load fills, in the same state before each run.

A virtual machine may hand free memory back to its host (free page reporting, after some seconds):
then the first touch of a page costs microseconds, five times what reading it does, whoever reads.
So before the clock starts the memory that the load is about to fill is touched and freed again.

And a loader that copies into tensors that it allocates measures zeroing and page faults.  An
inference server has its tensors' memory before it loads, pinned or on the accelerator; so malloc
has it beforehand here, in huge pages, which changes nothing in the loader.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pagecache_bpf.kernel.cgroups import host_memory

_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # include/uapi/asm-generic/mman-common.h
_LEFT_ALONE = 1 << 30
_PIECE = 1 << 30
#: Zeroing memory that is there takes 0.1 to 0.3 s a GiB, and 2 s where the host has to find it.
_SECONDS_PER_GIB = 0.6
_TRIES = 4
_MORE = 64 << 20  # what allocating tensors one by one takes beside their bytes
#: M_MMAP_MAX 0, M_TRIM_THRESHOLD never, M_ARENA_MAX 1; malloc.h.
_MALLOC = ((-4, 0), (-1, -1), (-8, 1))
_TUNABLES, _HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"  # glibc 2.35

_wanted = 0


@contextmanager
def backed(size: int) -> Iterator[None]:
    """Have touch() touch so many bytes in the block, as far as they are free; 0: none."""
    global _wanted
    before, _wanted = _wanted, size
    try:
        yield
    finally:
        _wanted = before


def touch() -> None:
    """Touch free memory, and free it again, until that is as fast as for memory that is there.

    What is freed is not what is taken next, so that a second time may meet other memory.
    """
    for _ in range(_TRIES):
        begun = time.monotonic()
        touched = _touch()
        if not touched or time.monotonic() - begun <= _SECONDS_PER_GIB * touched / (1 << 30):
            return


def _touch() -> int:
    """Touch free memory once; return how many bytes."""
    size = left = min(_wanted, host_memory().get("MemFree", 0) - _LEFT_ALONE)
    held: list[mmap.mmap] = []
    try:
        while left > 0:
            memory = mmap.mmap(-1, min(left, _PIECE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            held.append(memory)
            with suppress(OSError):
                memory.madvise(_MADV_HUGEPAGE)
            memory.madvise(_MADV_POPULATE_WRITE)
            left -= _PIECE
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOMEM, errno.EFAULT):  # before 5.14, too little
            raise
    finally:
        for memory in held:
            memory.close()
    return max(size, 0)


def reserve(tensors: int) -> None:
    """Let malloc have so many bytes, faulted in; it gives nothing back from now on."""
    size = tensors + _MORE
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    for option, value in _MALLOC:
        libc.mallopt(option, value)
    address = libc.malloc(size)
    if address:
        ctypes.memset(address, 0, size)
        libc.free(address)


def with_huge_malloc() -> None:
    """Start this program anew with a malloc that takes huge pages, unless it has been."""
    settings = os.environ.get(_TUNABLES, "")
    if _HUGE in settings:
        return
    os.environ[_TUNABLES] = f"{settings}:{_HUGE}" if settings else _HUGE
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)
