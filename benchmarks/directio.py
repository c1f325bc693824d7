# SPDX-License-Identifier: Apache-2.0
"""Whole files by direct I/O: how fast the device can be at all, and what is really on it."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel import direct_io
from pagecache_bpf.kernel.direct_io import ALIGNMENT, HUGE_PAGE

_MAP_POPULATE, _MAP_HUGETLB = 0x8000, 0x40000  # include/uapi/asm-generic/mman-common.h
_NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")


@dataclass(frozen=True)
class Plan:
    """How to read: bytes of one request, requests in flight."""

    block: int
    depth: int

    def __str__(self) -> str:
        return f"{self.block >> 10} KiB x {self.depth}"


# Small blocks suffer from the delay, deep queues of large ones from nothing but the
# bandwidth, as long as the device does not split them.
SWEEP = (Plan(256 << 10, 16), Plan(256 << 10, 32), Plan(1 << 20, 8), Plan(1 << 20, 32))


@contextmanager
def reserved(sizes: Sequence[int]) -> Iterator[bool]:
    """Huge pages for buffers of these sizes inside the block, the setting as before after it.

    Yields False where the machine has not so many to give: buffers are then of what
    transparent huge pages there are.
    """
    before = int(_NR_HUGEPAGES.read_text())
    wanted = before + sum(max(1, -(-size // HUGE_PAGE)) for size in sizes)
    try:
        _NR_HUGEPAGES.write_text(str(wanted))
        yield int(_NR_HUGEPAGES.read_text()) >= wanted
    finally:
        _NR_HUGEPAGES.write_text(str(before))


def _buffer(size: int, huge: bool = False) -> mmap.mmap:
    """Memory for direct reads: of the reserved huge pages (see reserved()), or direct_io.buffer."""
    if not huge:
        return direct_io.buffer(size)
    rounded = max(-(-size // HUGE_PAGE), 1) * HUGE_PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | _MAP_POPULATE
    return mmap.mmap(-1, rounded, flags=flags)


def read_into(
    files: Sequence[Path], plan: Plan, huge: bool = False
) -> Callable[[], list[memoryview]]:
    """Make ready to read whole files by direct I/O; calling the result does it.

    plan.depth threads share one list of requests in file order. The returned views hold the
    files' bytes. Raises OSError when a read fails, PagecacheError when a file shrinks.
    """
    sizes = [path.stat().st_size for path in files]
    buffers = [_buffer(size, huge) for size in sizes]
    requests = iter(
        [
            (number, offset, min(plan.block, -(-(size - offset) // ALIGNMENT) * ALIGNMENT))
            for number, size in enumerate(sizes)
            for offset in range(0, size, plan.block)
        ]
    )
    lock = threading.Lock()
    errors: list[BaseException] = []

    def worker(fds: list[int], views: list[memoryview]) -> None:
        try:
            while not errors:
                with lock:
                    request = next(requests, None)
                if request is None:
                    return
                number, offset, length = request
                end = min(offset + length, sizes[number])
                while offset < end:
                    view = views[number][offset : offset + length]
                    got = os.preadv(fds[number], [view], offset)
                    if got == 0:
                        raise PagecacheError(f"{files[number]} shrank while it was read")
                    offset, length = offset + got, length - got
        except BaseException as error:
            errors.append(error)

    def start() -> list[memoryview]:
        fds = [direct_io.open_path(path, f"cannot read {path} directly") for path in files]
        views = [memoryview(buffer) for buffer in buffers]
        threads = [
            threading.Thread(target=worker, args=(fds, views), daemon=True)
            for _ in range(plan.depth)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for fd in fds:
            os.close(fd)
        if errors:
            raise errors[0]
        return [view[:size] for view, size in zip(views, sizes, strict=True)]

    return start


def read_whole(path: Path) -> memoryview:
    """Return the bytes of a file as they are on the device; the page cache is not touched.

    Dirty pages are written back first (fsync). Raises UnsupportedError where the file system
    has no direct I/O.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.fsync(fd)
    os.close(fd)
    return read_into([path], Plan(1 << 20, 4))()[0]
