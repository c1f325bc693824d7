# SPDX-License-Identifier: Apache-2.0
"""How fast cached pages reach a process: the least that stands between page cache and device.

A file in memory is read into one buffer, as a loader reads cached weights.  An accelerator behind
a slower link gets less: whoever knows its speed gives it (--host-to-device-speed).
"""

from __future__ import annotations

import mmap
import os
import time

FILE_BYTES = 64 << 20
PIECE = 2 << 20
ROUNDS = 3


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
