# SPDX-License-Identifier: Apache-2.0
"""How fast cached pages reach a process: the least that stands between page cache and device.

A file in memory is read into one buffer, as a loader reads cached weights.  An accelerator behind
a slower link gets less: whoever knows its speed gives it (--host-to-device-speed).

A measurement beside other work says too little and never too much, so the best of several counts,
which are apart in time: a process that starts on a busy machine would else tell for all its life
that its node is a slow one.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable

FILE_BYTES = 64 << 20
PIECE = 2 << 20
ROUNDS = 3
#: After so many measurements the best one stays: 60 ms of a processor each.
MEASUREMENTS = 20


class CopySpeed:
    """The speed of copies out of the page cache, as the best of several measurements tells it."""

    def __init__(self, measure: Callable[[], float] | None = None) -> None:
        """Measure nothing yet.

        Args:
            measure: gives bytes a second; None: measure_copy().
        """
        self._measure = measure or measure_copy
        self._left = MEASUREMENTS
        self._best = 0.0

    def now(self) -> float:
        """Measure once more, as long as that is not enough yet.

        Returns:
            Bytes a second, the most that was measured by now.
        """
        if self._left:
            self._left -= 1
            self._best = max(self._best, self._measure())
        return self._best


def measure_copy() -> float:
    """Measure how fast one thread copies out of the page cache.

    Returns:
        Bytes a second, the best of ROUNDS rounds over FILE_BYTES.
    """
    fd = os.memfd_create("pagecache-bpf-copy", os.MFD_CLOEXEC)
    try:
        with mmap.mmap(-1, PIECE) as buffer:
            for offset in range(0, FILE_BYTES, PIECE):
                os.pwrite(fd, buffer, offset)
            return max(_round(fd, buffer) for _ in range(ROUNDS))
    finally:
        os.close(fd)


def _round(fd: int, buffer: mmap.mmap) -> float:
    began = time.perf_counter()
    for offset in range(0, FILE_BYTES, PIECE):
        os.preadv(fd, [buffer], offset)
    return FILE_BYTES / max(time.perf_counter() - began, 1e-9)
