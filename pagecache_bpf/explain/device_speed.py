# SPDX-License-Identifier: Apache-2.0
"""How fast a device is: a short read past the page cache, and the last such measurement.

Direct I/O into huge pages, several requests in flight in file order: what the device gives at
best.  Scattered small pages would measure the segment limit of its requests instead.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.errors import PagecacheError, UnsupportedError
from pagecache_bpf.kernel import direct_io
from pagecache_bpf.kernel.cachestat import resident_pages_or_none
from pagecache_bpf.kernel.direct_io import ALIGNMENT, timed_reads
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE

BLOCK_BYTES = 2 << 20
DEPTH = 16
SECONDS = 0.5  # no request begins after this
MAX_BYTES = 1 << 30
MAX_FILES = 64
#: Nothing is worth reading more than this along.
MAX_READ_ALONG = 4 << 20
SCATTERED = 4096  # requests of one page at most
ENOUGH_BYTES = 64 << 20  # less says more about the start than about the device


@dataclass(frozen=True)
class Speed:
    """A measured speed: of the device that holds a file, in bytes a second.

    bytes, seconds: what was read for it, and in what time; time_ns: when, since 1970.
    requests_per_second: of 4 KiB each, scattered and as many at a time; None if not measured.
    """

    bytes_per_second: float
    bytes: int
    seconds: float
    time_ns: int
    requests_per_second: float | None = None

    @property
    def read_along_bytes(self) -> int | None:
        """Bytes that the device reads in the time that one more request takes it.

        Two pieces that are closer than this are read faster as one.  None if it is not known.
        """
        if not self.requests_per_second:
            return None
        cost = self.bytes_per_second / self.requests_per_second - ALIGNMENT
        return min(max(0, round(cost / ALIGNMENT) * ALIGNMENT), MAX_READ_ALONG)


def measure(files: Sequence[Path], seconds: float = SECONDS, limit: int = MAX_BYTES) -> Speed:
    """Read files from the front, past the page cache, until the time or the bytes are up.

    What is in the page cache stays as it was.

    Args:
        files: the files, read in this order.
        seconds: how long at most.
        limit: how many bytes at most.

    Returns:
        Bytes and seconds that it took.

    Raises:
        UnsupportedError: the file system has no direct I/O.
        OSError: a file cannot be read.
    """
    chosen: list[Path] = []
    for path in files[:MAX_FILES]:
        if sum(file.stat().st_size for file in chosen) < limit:
            chosen.append(path)
    with ExitStack() as stack:
        fds = []
        for path in chosen:
            fds.append(direct_io.open_path(path, "the speed of the device cannot be measured"))
            stack.callback(os.close, fds[-1])
        pages = [resident_pages_or_none(fd) for fd in fds]
        total, took = timed_reads(_requests(fds, limit), DEPTH, BLOCK_BYTES, seconds)
        read, spent = timed_reads(_scattered(fds), DEPTH, ALIGNMENT, seconds / 2)
        after = [resident_pages_or_none(fd) for fd in fds]
        grown = sum((new or 0) - (old or 0) for old, new in zip(pages, after, strict=True))
    if grown * PAGE_SIZE > total // 2:
        raise UnsupportedError(
            "the speed of the device cannot be measured",
            "direct reads went through the page cache, or somebody reads the files just now",
        )
    scattered = read / ALIGNMENT / spent if read >= 64 * ALIGNMENT else None
    return Speed(total / took, total, took, time.time_ns(), scattered)


def _requests(fds: Sequence[int], limit: int) -> Iterator[tuple[int, int, int]]:
    """File descriptor, offset and length of each read, in file order, `limit` bytes in all."""
    for fd in fds:
        size = os.fstat(fd).st_size
        for offset in range(0, size, BLOCK_BYTES):
            if limit <= 0:
                return
            length = min(BLOCK_BYTES, -(-(size - offset) // ALIGNMENT) * ALIGNMENT)
            limit -= length
            yield fd, offset, length


def _scattered(fds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield single pages of the files, far apart and never in a row."""
    pages = [max(1, os.fstat(fd).st_size // ALIGNMENT) for fd in fds]
    for number in range(min(SCATTERED, sum(pages))):
        file = number % len(fds)
        # Multiples of an irrational share of the file are spread evenly over it.
        page = int(pages[file] * ((number * 0.6180339887498949) % 1.0))
        yield fds[file], page * ALIGNMENT, ALIGNMENT


def read_along_bytes(files: Sequence[Path]) -> int | None:
    """Return the gap between two reads that is cheaper read along, on the device of these files.

    It is measured where that was not done since the machine was booted.

    Args:
        files: weight files of one device.

    Returns:
        Bytes; None where it cannot be measured (no direct I/O, small files, no right to read).
    """
    try:
        device = os.stat(files[0]).st_dev
        known = last(device)
        if known is None or known.requests_per_second is None:
            if sum(path.stat().st_size for path in files[:MAX_FILES]) < ENOUGH_BYTES:
                return None
            known = measure(files)
            remember(device, known)
    except (PagecacheError, OSError):
        return None
    return known.read_along_bytes


def remember(device: int, speed: Speed) -> None:
    """Keep the speed of a device for last(); that it cannot be kept is no error.

    Args:
        device: st_dev of its files.
        speed: what measure() returned.
    """
    path = _memory()
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        devices = {**_remembered(), str(device): asdict(speed)}
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"boot": _boot(), "devices": devices}))
        new.replace(path)


def last(device: int) -> Speed | None:
    """Return the speed of a device as it was last measured.

    Args:
        device: st_dev of its files.

    Returns:
        The speed, None if none was measured since the machine was booted.
    """
    try:
        return Speed(**_remembered()[str(device)])
    except (KeyError, TypeError):
        return None


def _remembered() -> dict[str, dict[str, Any]]:
    """Read the speeds that were kept, by device number, which a reboot makes void."""
    try:
        content = json.loads(_memory().read_text())
        return dict(content["devices"]) if content["boot"] == _boot() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _boot() -> str | None:
    return LIVE.read("/proc/sys/kernel/random/boot_id")


def _memory() -> Path:
    if os.geteuid() == 0:
        return RUN_DIR / "speed.json"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "pagecache-bpf" / "speed.json"
