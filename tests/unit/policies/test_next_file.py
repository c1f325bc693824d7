# SPDX-License-Identifier: Apache-2.0
"""sequential in a session: how far it reads on into the model's next file."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagecache_bpf.kernel import abi
from pagecache_bpf.policy.compiler import compile_simulation

PAGE = 4096
MIB = 256  # pages
SHARD = 4 * MIB + 2  # a header and 4 MiB of tensors
FILES = 16
MISS, MARKER = 1, 2  # enum pagecache_kind
LATE = abi.F_LATE
#: Tells the policy of accesses, and what it has asked for then.
SOURCE = r"""// SPDX-License-Identifier: GPL-2.0-only
/*
 * going_on - asks stream_readahead() for a test
 *
 * When to use: in that test.
 * Limits: none.
 */
#include "policy.bpf.h"
#include "stream.bpf.h"

u64 cgroup_pages;

/* Returns how many requests came of it; the pages of an answer are one. */
u32 told(u32 file, u64 index, u32 kind, u32 flags, u64 time_ns)
{
	struct pagecache_answer answer = {};
	struct pagecache_ctx ctx = sim_ctx(file, index, 32, kind);

	ctx.flags = flags;
	ctx.time_ns = time_ns;
	ctx.cgroup_pages = cgroup_pages;
	sim.nr_prefetches = 0;
	if (stream_readahead(&ctx, &answer) == PAGECACHE_OVERRIDE && answer.nr)
		sim.prefetches[sim.nr_prefetches++] =
			(struct sim_wish){ answer.start, answer.nr, file, 0 };
	return sim.nr_prefetches;
}

u64 asked(u32 number, u32 what)
{
	struct sim_wish *wish = &sim.prefetches[number];

	return what == 0 ? wish->file : what == 1 ? wish->start : wish->start + wish->nr;
}

PAGECACHE_READAHEAD(going_on_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return stream_readahead(ctx, answer);
}

PAGECACHE_POLICY(going_on, .readahead = (void *)going_on_readahead);
"""


@dataclass
class Reader:
    """Reads a model of 16 small files, which are lent, in their order.

    Attributes:
        library: the compiled source.
        there: pages of each file that were asked for, from its begin.
        ahead: how far ahead of the reader was asked for, at each call.
        requests: what was asked for: file, first page, the page behind the last one.
        asked_at: for each of them, where the reader was: file and page.
    """

    library: ctypes.CDLL
    there: list[int]
    ahead: list[int]
    requests: list[tuple[int, int, int]]
    asked_at: list[tuple[int, int]]
    time_ns: int = 10**9

    def tell(self, file: int, index: int, kind: int, flags: int = 0) -> None:
        """The policy hears of an access."""
        self.time_ns += 10**7
        numbers = self.library.told(
            *(file, ctypes.c_uint64(index), kind, flags, ctypes.c_uint64(self.time_ns))
        )
        for number in range(numbers):
            where, start, end = (int(self.library.asked(number, what)) for what in range(3))
            self.requests.append((where, start, end))
            self.asked_at.append((file, index))
            self.there[where] = max(self.there[where], end)
        self.ahead.append(sum(self.there[file:]) - index)

    def read(self, file: int, late: bool) -> None:
        """Read a file; there is a marker at each MiB that was asked for."""
        for index in range(0, SHARD, 32):
            if index >= self.there[file]:
                self.tell(file, index, MISS)
                self.there[file] = max(self.there[file], index + 32)
            elif index % MIB == 0:
                self.tell(file, index, MARKER, LATE if late else 0)

    def load(self, late: bool = True) -> None:
        """Read the model."""
        for file in range(FILES):
            self.read(file, late)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[ctypes.CDLL]:
    source = tmp_path / "going_on.bpf.c"
    source.write_text(SOURCE)
    library = ctypes.CDLL(str(compile_simulation(source)))
    library.asked.restype = ctypes.c_uint64
    library.sim_start.argtypes = (
        *(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_bool, ctypes.c_uint32),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    )
    sizes, models = array("Q", [SHARD * PAGE] * FILES), array("I", [7] * FILES)
    started = library.sim_start(
        *(1 << 30, 12, 0, True, FILES),
        *(sizes.buffer_info()[0], models.buffer_info()[0], b"\1" * FILES),
    )
    assert started == 0
    ctypes.c_uint64.in_dll(library, "cgroup_pages").value = 0
    ctypes.c_uint32.in_dll(library, "start_window_kib").value = 4 << 10
    yield library
    library.sim_end()


@pytest.fixture
def reader(library: ctypes.CDLL) -> Reader:
    library.sim_lend()
    return Reader(library, [0] * FILES, [], [], [])


def test_the_window_grows_from_file_to_file(reader: Reader) -> None:
    """Each file is as large as the window to begin with, and a little larger."""
    reader.load()
    assert reader.there == [SHARD] * FILES
    # All of a file is asked for at once, when the reader comes to the one before it.
    for file in range(3, FILES):
        assert reader.asked_at[reader.requests.index((file, 0, SHARD))] == (file - 1, 0)
    assert sum(where >= 3 for where, _, _ in reader.requests) == FILES - 3


def test_a_reader_that_need_not_wait_has_the_window_of_its_begin(reader: Reader) -> None:
    reader.load(late=False)
    assert max(reader.ahead) <= 4 * MIB + SHARD - 4 * MIB + MIB


def test_a_rest_is_not_asked_for_alone(reader: Reader) -> None:
    reader.load()
    sizes = [end - start for _, start, end in reader.requests[1:]]
    assert min(sizes) >= 32, reader.requests


def test_a_file_that_fits_into_the_window_is_asked_for_as_a_whole(
    library: ctypes.CDLL, reader: Reader
) -> None:
    ctypes.c_uint32.in_dll(library, "start_window_kib").value = 6 << 10
    reader.load(late=False)
    for file in range(1, FILES):
        assert (file, 0, SHARD) in reader.requests


@pytest.mark.parametrize("mib", [3, 6, 9])
def test_what_a_cgroup_may_hold_bounds_it(library: ctypes.CDLL, reader: Reader, mib: int) -> None:
    """A quarter of it lies ahead of the reader at most."""
    ctypes.c_uint64.in_dll(library, "cgroup_pages").value = 4 * mib * MIB
    reader.load()
    assert reader.there == [SHARD] * FILES
    assert max(reader.ahead) <= mib * MIB


def test_without_a_session_a_file_ends_at_its_end(library: ctypes.CDLL) -> None:
    alone = Reader(library, [0] * FILES, [], [], [])
    alone.read(0, late=True)
    assert {where for where, _, _ in alone.requests} == {0}
    alone.load()
    assert alone.there == [SHARD] * FILES
    assert max(alone.ahead) <= SHARD
