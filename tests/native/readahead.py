# SPDX-License-Identifier: Apache-2.0
"""The kernel's readahead window of the device below a file, as most machines have it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def usual_readahead(path: Path) -> Iterator[None]:
    """Set read_ahead_kb to 128 for the block, where there is such a device."""
    device = path.stat().st_dev
    block = Path("/sys/dev/block") / f"{os.major(device)}:{os.minor(device)}"
    window = block / "queue" / "read_ahead_kb"
    if not window.exists():  # a partition
        window = block.resolve().parent / "queue" / "read_ahead_kb"
    before = window.read_text() if window.exists() else None
    if before is not None:
        window.write_text("128")
    try:
        yield
    finally:
        if before is not None:
            window.write_text(before)
