# SPDX-License-Identifier: Apache-2.0
"""What the kernel counts of block devices."""

from __future__ import annotations

import os
from pathlib import Path


def device_bytes_read(path: Path) -> int | None:
    """Bytes read so far from the block device below `path`; None without one (9p, tmpfs)."""
    device = os.stat(path).st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    try:
        sectors = int(stat.read_text().split()[2])
    except FileNotFoundError:
        return None
    return sectors * 512  # the kernel's unit here, whatever the device's sector size


def difference(before: int | None, after: int | None) -> int | None:
    """Bytes read between two counts; None if there is no device to count."""
    return None if before is None or after is None else after - before
