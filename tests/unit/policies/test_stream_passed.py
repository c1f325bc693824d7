# SPDX-License-Identifier: Apache-2.0
"""What of a file its readers that stream have passed, and what of it lies in their windows."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagecache_bpf.kernel.abi import Eviction
from pagecache_bpf.policy.compiler import compile_simulation

SECOND = 10**9
WINDOW = 1024  # pages
#: Says where streams are, and asks what is to become of a page.
SOURCE = r"""// SPDX-License-Identifier: GPL-2.0-only
/*
 * passing - calls note_place() and stream_evict() for a test
 *
 * When to use: in that test.
 * Limits: none.
 */
#include "policy.bpf.h"
#include "stream.bpf.h"

static struct stream streams[16];
static u64 ino;

void next_file(void)
{
	ino++;
	__builtin_memset(streams, 0, sizeof(streams));
}

void told(u32 reader, u64 low, u64 index, u64 window, u64 time_ns, u32 down)
{
	struct pagecache_ctx ctx = {
		.page_shift = 12, .ino = ino, .file_id = reader + 1, .index = index, .time_ns = time_ns,
	};
	struct stream *s = &streams[reader];

	s->low = low;
	s->window = window;
	s->ahead = index + window;
	note_place(&ctx, s, down);
}

s32 verdict(u64 index, u64 nr, u64 time_ns)
{
	struct pagecache_ctx ctx = {
		.page_shift = 12, .ino = ino, .index = index, .nr = nr, .time_ns = time_ns,
	};

	return stream_evict(&ctx);
}

PAGECACHE_READAHEAD(passing_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return stream_readahead(ctx, answer);
}

PAGECACHE_POLICY(passing, .readahead = (void *)passing_readahead);
"""


@dataclass
class File:
    """A file with readers.

    Attributes:
        library: the compiled source.
        time_ns: the clock.
    """

    library: ctypes.CDLL
    time_ns: int = SECOND

    def told(self, reader: int, index: int, *, low: int = 0, down: bool = False) -> None:
        """A reader that began at page `low` comes to page `index`."""
        numbers = (low, index, WINDOW, self.time_ns)
        self.library.told(reader, *map(ctypes.c_uint64, numbers), int(down))

    def verdict(self, index: int, nr: int = 1) -> Eviction:
        """What is to become of a folio of `nr` pages from page `index` on."""
        numbers = (index, nr, self.time_ns)
        return Eviction(self.library.verdict(*map(ctypes.c_uint64, numbers)))


@pytest.fixture
def file(tmp_path: Path) -> File:
    source = tmp_path / "passing.bpf.c"
    source.write_text(SOURCE)
    library = ctypes.CDLL(str(compile_simulation(source)))
    library.next_file()  # the same library as in the last test: it is loaded once
    return File(library)


def test_what_was_passed_goes_and_the_window_stays(file: File) -> None:
    assert file.verdict(0) == Eviction.EVICT_DEFAULT
    file.told(0, 10_000)
    assert file.verdict(0) == Eviction.EVICT_NOW
    assert file.verdict(10_000 - WINDOW - 1) == Eviction.EVICT_NOW
    assert file.verdict(10_000) == file.verdict(10_000 + WINDOW - 1) == Eviction.EVICT_KEEP
    assert file.verdict(10_000 + WINDOW) == Eviction.EVICT_DEFAULT


def test_a_reader_may_come_back_by_a_window(file: File) -> None:
    """As memcpy() does, which touches the last page of a range first."""
    file.told(0, 10_000)
    assert file.verdict(10_000 - WINDOW) == file.verdict(9_999) == Eviction.EVICT_DEFAULT


def test_large_folios_count_as_a_whole(file: File) -> None:
    file.told(0, 10_000)
    assert file.verdict(10_000 - WINDOW - 511, 512) == Eviction.EVICT_DEFAULT
    assert file.verdict(10_000 - WINDOW - 512, 512) == Eviction.EVICT_NOW
    assert file.verdict(9_999, 2) == Eviction.EVICT_KEEP


def test_what_another_reader_comes_to_does_not_go(file: File) -> None:
    file.told(0, 50_000)
    file.told(1, 10_000)
    assert file.verdict(5_000) == Eviction.EVICT_NOW
    assert file.verdict(30_000) == Eviction.EVICT_DEFAULT
    assert file.verdict(10_500) == file.verdict(50_500) == Eviction.EVICT_KEEP


def test_nothing_is_known_of_what_lies_before_a_stream(file: File) -> None:
    file.told(0, 50_000, low=40_000)
    assert file.verdict(39_999) == Eviction.EVICT_DEFAULT
    assert file.verdict(40_000) == Eviction.EVICT_NOW


def test_a_reader_that_goes_down_has_passed_nothing(file: File) -> None:
    file.told(0, 9_999, low=9_000, down=True)
    assert file.verdict(9_000) == file.verdict(9_999) == Eviction.EVICT_KEEP
    assert file.verdict(5_000) == file.verdict(8_999) == Eviction.EVICT_DEFAULT


def test_a_reader_that_is_gone_says_nothing(file: File) -> None:
    file.told(0, 10_000)
    file.time_ns += 3 * SECOND
    assert file.verdict(0) == file.verdict(10_000) == Eviction.EVICT_DEFAULT


def test_a_ninth_reader_takes_the_place_of_the_first(file: File) -> None:
    for reader in range(9):
        file.time_ns += 1
        file.told(reader, 100_000 + reader * 10_000)
    assert file.verdict(180_000) == Eviction.EVICT_KEEP
    assert file.verdict(100_000) == Eviction.EVICT_NOW
    file.told(0, 100_000)  # it takes that of the second one, and not its own of before
    assert file.verdict(100_000) == file.verdict(180_000) == Eviction.EVICT_KEEP
    assert file.verdict(110_000) == Eviction.EVICT_DEFAULT
