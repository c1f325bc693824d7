# SPDX-License-Identifier: Apache-2.0
"""The kernel's readahead window of the device below a file, as most machines have it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def window_of(path: Path) -> Path | None:
    """The file with the readahead window, in KiB, of the device below a file, if it has one."""
    device = path.stat().st_dev
    block = Path("/sys/dev/block") / f"{os.major(device)}:{os.minor(device)}"
    # A partition has the queue of its disk.
    places = (block / "queue", block.resolve().parent / "queue")
    return next((place / "read_ahead_kb" for place in places if place.exists()), None)


@contextmanager
def usual_readahead(path: Path) -> Iterator[None]:
    """Set read_ahead_kb to 128 for the block, where there is such a device."""
    window = window_of(path)
    if window is None:
        yield
        return
    before = window.read_text()
    window.write_text("128")
    try:
        yield
    finally:
        window.write_text(before)
