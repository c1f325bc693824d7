# SPDX-License-Identifier: Apache-2.0
"""What of a file is in the page cache: eviction that is verified, a sampler."""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.cachestat import CacheStat, cached_pages, cachestat
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

__all__ = [
    "PAGE_SIZE",
    "CacheStat",
    "NotCold",
    "Sampler",
    "cachestat",
    "drop",
    "resident_bytes",
    "resident_pages",
]


class NotCold(PagecacheError):
    """A file that should have left the page cache is still (partly) there."""


def resident_pages(path: str | Path) -> int:
    """Pages of the file in the page cache (raises as cached_pages() does)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return cached_pages(fd)
    finally:
        os.close(fd)


def resident_bytes(paths: Iterable[str | Path]) -> int:
    """Return how many bytes of the files are in the page cache, whole pages counted."""
    return sum(resident_pages(path) for path in paths) * PAGE_SIZE


def _evict(path: str | Path) -> int:
    """Write the file back, ask the kernel to forget it, return the pages that stayed."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that is never written to (erofs)
                raise
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return cached_pages(fd)
    finally:
        os.close(fd)


def drop(paths: Iterable[str | Path], timeout_s: float = 5.0) -> None:
    """Put every page of the files out of the page cache, and prove it.

    Pages under I/O are locked and survive DONTNEED, so what is left is asked for again until
    timeout_s has passed. Raises NotCold naming the file when pages stay (mapped by somebody,
    or brought back by a reader).
    """
    deadline = time.monotonic() + timeout_s
    for path in paths:
        while left := _evict(path):
            if time.monotonic() >= deadline:
                raise NotCold(
                    f"{path} is not cold",
                    f"{left} pages stayed in the page cache after fsync and DONTNEED",
                    "Mapped pages stay: stop whoever maps or reads the file, then try again.",
                )
            time.sleep(0.01)


@dataclass(frozen=True)
class Sample:
    """Residency at one moment: seconds on CLOCK_MONOTONIC, bytes in the page cache."""

    at_s: float
    resident: int


class Sampler:
    """Records the residency of files over time from a process of its own.

    A process, not a thread: the loader under test must not share an interpreter lock with the
    observer. One sample costs one cachestat() per file. Use as a context manager; `samples`
    is filled when the block ends.
    """

    _RECORD = struct.Struct("=dQ")

    def __init__(self, paths: Sequence[str | Path], interval_s: float = 0.1) -> None:
        self.paths, self.interval_s = list(paths), interval_s
        self.samples: list[Sample] = []
        self._pid = 0
        self._out = self._stop = -1

    def __enter__(self) -> Sampler:
        self._out, out_w = os.pipe()
        stop_r, self._stop = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                os.close(self._out)
                os.close(self._stop)
                self._watch(out_w, stop_r)
                code = 0
            finally:
                os._exit(code)
        os.close(out_w)
        os.close(stop_r)
        # The first byte says that the files are open and the first sample is taken.
        os.read(self._out, 1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._stop)
        data = bytearray()
        while piece := os.read(self._out, 65536):
            data += piece
        os.close(self._out)
        _, status = os.waitpid(self._pid, 0)
        whole = len(data) - len(data) % self._RECORD.size
        self.samples = [Sample(*pair) for pair in self._RECORD.iter_unpack(data[:whole])]
        if kind is None and status != 0:
            raise PagecacheError("the residency sampler died", f"wait status {status}")

    def _watch(self, out: int, stop: int) -> None:
        """Sample until the parent closes its end of the stop pipe; runs in the child."""
        fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self.paths]
        os.set_blocking(stop, False)
        records = bytearray()
        while True:
            pages = sum(cachestat(fd).cached for fd in fds)
            records += self._RECORD.pack(time.monotonic(), pages * PAGE_SIZE)
            if len(records) == self._RECORD.size:
                os.write(out, b".")
            try:
                if os.read(stop, 1) == b"":
                    break
            except BlockingIOError:
                time.sleep(self.interval_s)
        # Everything is written at the end, so that sampling never waits for the parent.
        view = memoryview(records)
        while view:
            view = view[os.write(out, view) :]
