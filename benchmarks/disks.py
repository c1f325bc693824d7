# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of block devices, and counts of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pagecache_bpf.errors import PagecacheError


def queue_of(path: Path) -> Path:
    """Return the sysfs directory of the queue that a path's block device belongs to.

    Raises PagecacheError where there is none (tmpfs, a network).
    """
    device = os.stat(path).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for place in (node, node.parent):  # a partition has its disk's
        if (place / "queue" / "read_ahead_kb").is_file():
            return place / "queue"
    raise PagecacheError(f"{path} is not on a block device", "", "Put the checkpoint on a disk")


def device_bytes_read(path: Path) -> int | None:
    """Return the bytes read so far from the device below `path`; None without one (9p, tmpfs)."""
    sectors = _count(path, 2)
    # The kernel's unit here, whatever the device's sector size.
    return None if sectors is None else sectors * 512


def device_reads(path: Path) -> int | None:
    """Return the reads that the device below `path` has completed; None without one."""
    return _count(path, 0)


def _count(path: Path, column: int) -> int | None:
    device = os.stat(path).st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    try:
        return int(stat.read_text().split()[column])
    except FileNotFoundError:
        return None


def difference(before: int | None, after: int | None) -> int | None:
    """Return the bytes read between two counts; None if there is no device to count."""
    return None if before is None or after is None else after - before


def settled_bytes_read(path: Path, quiet_s: float = 0.1, limit_s: float = 5.0) -> int | None:
    """Return the bytes read so far, once nothing was read for a while.

    What is read ahead of a reader that has ended is read all the same, and belongs to it.

    Args:
        path: a file on the device.
        quiet_s: seconds without a read that end the wait.
        limit_s: seconds after which it ends at the latest.

    Returns:
        The count; None without a device.
    """
    deadline = time.monotonic() + limit_s
    count, since = device_bytes_read(path), time.monotonic()
    while count is not None and time.monotonic() < min(deadline, since + quiet_s):
        time.sleep(0.01)
        now = device_bytes_read(path)
        if now != count:
            count, since = now, time.monotonic()
    return count
