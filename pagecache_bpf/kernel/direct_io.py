# SPDX-License-Identifier: Apache-2.0
"""Direct I/O: reads past the page cache, and how many bytes of them a device gives in what time."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

ALIGNMENT = 4096  # what O_DIRECT asks of offsets and lengths on any device we meet
HUGE_PAGE = 2 << 20


def open_direct(fd: int) -> int:
    """Open the file behind a descriptor for direct I/O, without a path that anybody could change.

    Args:
        fd: an open descriptor of a regular file.

    Returns:
        A descriptor whose reads go past the page cache, closed on exec.

    Raises:
        OSError: its file system has no direct I/O (EINVAL), or this process may not read it.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)


def open_path(path: Path, what: str) -> int:
    """Open a file that the user has named for direct I/O.

    Args:
        path: the file.
        what: what cannot be done without direct I/O, for the error.

    Returns:
        A descriptor whose reads go past the page cache, closed on exec.

    Raises:
        UnsupportedError: its file system has no direct I/O.
        OSError: it cannot be opened for another reason.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise UnsupportedError(
            what,
            f"the file system of {path} has no direct I/O",
            "Put the checkpoint on a file system with a block device below (ext4, xfs)",
        ) from error


def buffer(size: int) -> mmap.mmap:
    """Allocate memory for direct reads: faulted in, of huge pages where the kernel grants them.

    Scattered 4 KiB pages would split large requests at the device's segment limit.

    Args:
        size: bytes that are needed.

    Returns:
        Anonymous memory, rounded up to whole huge pages.
    """
    rounded = max(-(-size // HUGE_PAGE), 1) * HUGE_PAGE
    memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory[::PAGE_SIZE] = bytes(rounded // PAGE_SIZE)
    return memory


def timed_reads(
    requests: Iterator[tuple[int, int, int]], depth: int, most_bytes: int, seconds: float
) -> tuple[int, float]:
    """Read, several requests at a time, until they or the time are up.

    Args:
        requests: descriptor, offset and length of each read.
        depth: how many are in flight.
        most_bytes: length of the longest.
        seconds: no read begins after this.

    Returns:
        The bytes that were read, and the seconds that it took.

    Raises:
        OSError: a read failed.
    """
    stride = -(-most_bytes // HUGE_PAGE) * HUGE_PAGE
    memory = buffer(depth * stride)
    lock = threading.Lock()
    errors: list[OSError] = []
    done = [0] * depth
    begin = time.perf_counter()

    def worker(number: int) -> None:
        with memoryview(memory) as whole, whole[number * stride :][:most_bytes] as view:
            while not errors and time.perf_counter() - begin < seconds:
                with lock:
                    request = next(requests, None)
                if request is None:
                    break
                fd, offset, length = request
                try:
                    with view[:length] as part:
                        done[number] += os.preadv(fd, [part], offset)
                except OSError as error:
                    errors.append(error)

    threads = [threading.Thread(target=worker, args=(n,), daemon=True) for n in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begin
    memory.close()
    if errors:
        raise errors[0]
    return sum(done), max(took, 1e-9)
