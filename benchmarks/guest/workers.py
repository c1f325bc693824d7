# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of the module's threads, which read ahead and make room for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def told_of_workers(name: str) -> Iterator[str]:
    """Yield the text of /proc/PID/NAME for each thread of the module that runs."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (process / "comm").read_text().startswith("pagecache/"):
                yield (process / name).read_text()
