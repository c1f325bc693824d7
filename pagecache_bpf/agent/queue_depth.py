# SPDX-License-Identifier: Apache-2.0
"""How many chunks to have a device read at once: measured once, and adapted while it works.

Too few leave the device idle, too many only make readers wait for each other, and devices differ by
a factor of a hundred, so there is no default that fits.  The probe reads a part of a tagged file by
direct I/O, for a fraction of a second; what it finds is kept in the run directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagecache_bpf._run_dir import RUN_DIR
from pagecache_bpf.agent.worker import CHUNK_BYTES, MAX_DEPTH
from pagecache_bpf.kernel.direct_io import open_direct, timed_reads
from pagecache_bpf.kernel.file_key import identity_of

DEFAULT_DEPTH = 8
#: Direct I/O keeps a device busy with fewer than fills of the page cache do, which also take the
#: CPU's time between two requests; with two at a time a fill was three times slower than with
#: eight.
LEAST_DEPTH = 4
PROBED_DEPTHS = (1, 2, 4, 8, 16)
STEP_BYTES = 64 << 20
STEP_SECONDS = 0.1
#: How often the best depth is measured again.  The median of all counts: one measurement of 64 MiB
#: differs by a fifth from the next, and by it readers are left alone.
REPEATS = 3
#: A larger depth has to be faster by this share to be worth it.
GAIN = 0.05
#: The least that a file has to hold for a probe to mean something.
LEAST_BYTES = 32 << 20


@dataclass(frozen=True)
class Depth:
    """What is known of a device.

    Attributes:
        depth: chunks of CHUNK_BYTES to have it read at once.
        bytes_per_second: how fast it reads then; 0: not known.
        source: "measured", "kept" (from a run before this one) or "default".
    """

    depth: int
    bytes_per_second: int
    source: str


_DEFAULT = Depth(DEFAULT_DEPTH, 0, "default")


class Depths:
    """Queue depths by device (MAJOR:MINOR), kept in a file of the run directory.

    Args:
        path: the file; None: the usual one.  One that cannot be read counts as empty.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or RUN_DIR / "depths.json"
        self._known: dict[str, Depth] = {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            for device, kept in json.loads(self._path.read_text()).items():
                depth = min(max(1, int(kept["depth"])), MAX_DEPTH)
                self._known[device] = Depth(depth, int(kept["bytes_per_second"]), "kept")

    def of(self, fd: int) -> Depth:
        """Return the depth for the device of an open file, measured if it is not known.

        Args:
            fd: the file.

        Returns:
            What is known, measured or, where that is impossible, the default.
        """
        device = _device(fd)
        known = self._known.get(device)
        if known is None:
            known = self._known[device] = probe(fd)
            self._keep()
        return known

    def kept(self, fd: int) -> Depth:
        """Return the depth for the device of an open file without reading of it.

        Args:
            fd: the file.

        Returns:
            What is known, or the default, which the tuner adapts.
        """
        return self._known.get(_device(fd), _DEFAULT)

    def learned(self, device: str, depth: int, bytes_per_second: int) -> None:
        """Keep what the tuner has found for a device.

        Args:
            device: MAJOR:MINOR.
            depth: chunks at once.
            bytes_per_second: how fast the device reads then.
        """
        self._known[device] = Depth(depth, bytes_per_second, "measured")
        self._keep()

    def _keep(self) -> None:
        """Write what is known into the run directory, atomically; what cannot be is lost."""
        kept = {
            device: {"depth": found.depth, "bytes_per_second": found.bytes_per_second}
            for device, found in self._known.items()
            if found.source != "default"
        }
        partial = self._path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # it is found again
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial.write_text(json.dumps(kept) + "\n")
            partial.replace(self._path)


def _device(fd: int) -> str:
    """Name the device that the pages of an open file come from, as MAJOR:MINOR."""
    major, minor, *_ = identity_of(fd)
    return f"{major}:{minor}"


def probe(fd: int) -> Depth:
    """Measure the depth for a device: the least within GAIN of the fastest.

    Takes at most about a second and leaves the page cache as it is.

    Args:
        fd: a file on it, open for reading.

    Returns:
        The depth; the default where the file is too small or its file system has no direct I/O.
    """
    size = os.fstat(fd).st_size
    if size < LEAST_BYTES:
        return _DEFAULT
    try:
        direct = open_direct(fd)
    except OSError:
        return _DEFAULT
    try:
        speeds = {}
        at = 0
        for depth in PROBED_DEPTHS:
            speeds[depth], at = _speed(direct, depth, at, size)
        best = max(speeds.values())
        depth = min(tried for tried in speeds if speeds[tried] >= best * (1 - GAIN))
        again = [best]
        for _ in range(REPEATS):
            speed, at = _speed(direct, depth, at, size)
            again.append(speed)
    except OSError:
        return _DEFAULT
    finally:
        os.close(direct)
    return Depth(depth, int(sorted(again)[len(again) // 2]), "measured")


def _speed(fd: int, depth: int, at: int, size: int) -> tuple[float, int]:
    """Measure bytes per second at a depth; return also where in the file the next one goes on."""

    def requests() -> Iterator[tuple[int, int, int]]:
        nonlocal at
        for _ in range(-(-STEP_BYTES // CHUNK_BYTES)):
            offset = at if at + CHUNK_BYTES <= size else 0
            at = offset + CHUNK_BYTES
            yield fd, offset, CHUNK_BYTES

    read, took = timed_reads(requests(), depth, CHUNK_BYTES, STEP_SECONDS)
    return read / took, at


class Tuner:
    """Tries the neighbors of a depth now and then, and stays where the device is faster.

    Only time in which the queue never ran empty counts: otherwise the readers are the limit.

    Args:
        depth: chunks at once to begin with.
        least: chunks at once that it never goes below.

    Attributes:
        depth: chunks at once now.
        bytes_per_second: how fast the device reads at the best depth so far; 0: not known yet.
        learned: whether another depth than the first one has turned out to be better.
    """

    TRIAL_BYTES = 256 << 20
    LONGEST_PAUSE = 64  # trials' worth of bytes between two tries

    def __init__(self, depth: int, least: int = 1) -> None:
        self.depth = depth
        self._least = least
        self.bytes_per_second = 0.0
        self.learned = False
        self._best = depth
        self._up = True
        self._pause = 4
        self._left = 4
        self._begun = 0.0
        self._bytes = 0

    def observe(self, settled: int, queued: int, now: float) -> bool:
        """Take note of what has been read.

        Args:
            settled: bytes that have been read since the last call.
            queued: bytes that wait or are being read.
            now: seconds of the monotonic clock.

        Returns:
            Whether the depth has changed.
        """
        if queued < self.depth * CHUNK_BYTES:
            self._bytes = 0
            return False
        if not self._bytes:
            self._begun = now
        self._bytes += settled
        if self._bytes < self.TRIAL_BYTES or now <= self._begun:
            return False
        speed = self._bytes / (now - self._begun)
        self._bytes = 0
        before = self.depth
        if self.depth != self._best:
            self._judge(speed)
        else:
            self.bytes_per_second = speed
            self._left -= 1
            if self._left <= 0:
                self._try()
        return self.depth != before

    def _try(self) -> None:
        """Go to the next depth to be tried, twice or half of the best one."""
        wanted = self._best * 2 if self._up else self._best // 2
        self.depth = max(self._least, min(wanted, MAX_DEPTH))
        self._left = self._pause

    def _judge(self, speed: float) -> None:
        # Fewer at the same speed are as good; more have to pay.
        """Decide whether the depth that was tried is better: a smaller one if it is as fast."""
        needed = 1 + GAIN if self.depth > self._best else 1 - GAIN / 5
        if speed >= self.bytes_per_second * needed:
            self._best, self.bytes_per_second = self.depth, speed
            self.learned = True
            self._pause = 4
        else:
            self.depth = self._best
            self._up = not self._up
            self._pause = min(self._pause * 2, self.LONGEST_PAUSE)
        self._left = self._pause
