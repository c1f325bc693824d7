# SPDX-License-Identifier: Apache-2.0
"""Reads traces, and turns I/O templates (`template record`, `template derive`) into traces.

Knows no policy and no cache: those are the simulator's.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

from pagecache_bpf import templates
from pagecache_bpf.simulate import trace
from pagecache_bpf.simulate.trace import Trace, TraceFile

PIECE_BYTES = 1 << 20
#: A template says in what order its consumers read, not when: all begin at once and read so fast.
BYTES_PER_SECOND = 1_000_000_000


def read(path: Path) -> Trace:
    """Read a trace, or a template as one.

    Args:
        path: the file.

    Returns:
        The trace; all consumers of a template begin at once, and read 1 GB/s each.

    Raises:
        UsageError: the file is damaged.
    """
    return _trace_of(path) if templates.is_template(path) else trace.read(path)


def _trace_of(path: Path) -> Trace:
    template = templates.read(path)
    found = Trace([TraceFile(file.path, file.size, path.stem) for file in template.files])

    def reads(consumer: int) -> Iterator[tuple[float, int, int, int, int]]:
        done = 0
        for extent in template.of(consumer):
            file, offset, length = (int(extent[name]) for name in ("file", "offset", "length"))
            for at in range(offset, offset + length, PIECE_BYTES):
                piece = min(PIECE_BYTES, offset + length - at)
                yield done / BYTES_PER_SECOND, consumer, file, at, piece
                done += piece

    for seconds, consumer, file, at, piece in heapq.merge(
        *(reads(number) for number in range(len(template.consumers)))
    ):
        name = f"{consumer}: {template.consumers[consumer]}"
        found.add(seconds, name, template.files[file].path, at, piece)
    return found.settle()
