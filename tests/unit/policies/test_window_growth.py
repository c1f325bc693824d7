# SPDX-License-Identifier: Apache-2.0
"""How the window of a stream grows: while that helps, and now and then to see whether it does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from pagecache_bpf.policy.compiler import compile_simulation

MIB = 256  # pages
#: Calls grow() as a reader that has to wait at each marker would, with a clock of its own.
SOURCE = r"""// SPDX-License-Identifier: GPL-2.0-only
/*
 * growing - calls grow() for a test
 *
 * When to use: in that test.
 * Limits: none.
 */
#include "policy.bpf.h"
#include "stream.bpf.h"

static struct stream stream;
static struct pagecache_ctx reader = { .page_shift = 12, .file_pages = 1ULL << 40 };

void restart(void)
{
	__builtin_memset(&stream, 0, sizeof(stream));
}

u64 grown(u64 index, u64 time_ns)
{
	reader.index = index;
	reader.time_ns = time_ns;
	if (!stream.window)
		open_window(&stream, &reader, 32 << 8);
	grow(&stream, &reader);
	return stream.window;
}

PAGECACHE_READAHEAD(growing_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return stream_readahead(ctx, answer);
}

PAGECACHE_POLICY(growing, .readahead = (void *)growing_readahead);
"""


class Reader:
    """Reads a window at a time, as fast as the device is with that window."""

    def __init__(self, directory: Path) -> None:
        source = directory / "growing.bpf.c"
        source.write_text(SOURCE)
        self.library = ctypes.CDLL(str(compile_simulation(source)))
        ctypes.c_uint32.in_dll(self.library, "max_window_mib").value = 512
        self.library.grown.restype = ctypes.c_uint64
        self.library.restart()
        self.index, self.time_ns = 0, 1.0
        self.windows = [self.read(0, 1)]

    def read(self, pages: int, mib_per_s: float) -> int:
        """Go on for so many pages; the window in pages then."""
        self.index += pages
        self.time_ns += pages / MIB / mib_per_s * 1e9
        grown = self.library.grown(ctypes.c_uint64(self.index), ctypes.c_uint64(int(self.time_ns)))
        return int(grown) // MIB

    def go(self, mib: int, speed: Callable[[int], float]) -> None:
        """Read so many MiB; speed: MiB/s with a window of so many MiB."""
        end = self.index + mib * MIB
        while self.index < end:
            window = self.windows[-1]
            self.windows.append(self.read(window * MIB, speed(window)))


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def test_a_window_that_helps_is_grown_to_the_bound(reader: Reader) -> None:
    reader.go(4096, lambda window: 10.0 * window)
    assert reader.windows[:5] == [32, 64, 128, 256, 512]
    assert set(reader.windows[5:]) == {512}


def test_a_slow_moment_is_not_for_ever(reader: Reader) -> None:
    """What was slow when it was measured is measured again a GiB later."""
    reader.go(64, lambda window: 10.0 * window)
    reader.go(64, lambda window: 100.0)
    settled = reader.windows[-1]
    reader.go(800, lambda window: 10.0 * window)
    assert set(reader.windows[-5:]) == {settled}
    reader.go(2048, lambda window: 10.0 * window)
    assert reader.windows[-1] > settled


def test_a_window_that_does_not_help_goes_back(reader: Reader) -> None:
    """The device is as fast with a smaller one, each time that it is asked."""
    reader.go(64, lambda window: 10.0 * window)
    reader.go(8192, lambda window: 640.0)
    settled = reader.windows[3]
    tried = {window for window in reader.windows[3:] if window != settled}
    assert tried == {2 * settled}
    assert reader.windows[3:].count(2 * settled) <= 8
