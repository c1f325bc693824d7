# SPDX-License-Identifier: Apache-2.0
"""What of a request is read: real files, of which the tests put chosen pages into the page cache.

Random reads bring in just their pages, which cachestat or mincore confirms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.agent import missing_parts
from pagecache_bpf.agent.missing_parts import parts_of
from pagecache_bpf.agent.read_threads import Extent, Source
from pagecache_bpf.agent.worker import CHUNK_BYTES as CHUNK
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

#: Three chunks, and a part of a page.
SIZE = 3 * CHUNK + 100
PAGES = -(-SIZE // PAGE_SIZE)


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[int]:
    """A file none of whose pages are cached, read at random."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    assert cached_pages(fd) == 0
    yield fd
    os.close(fd)


@pytest.fixture
def whole(weights: int) -> Extent:
    """A request for all of it."""
    return Extent(Source(lambda: os.dup(weights)), 0, PAGES * PAGE_SIZE, 1)


def cache(fd: int, start: int, length: int) -> None:
    """Bring pages into the page cache, and no others."""
    before = cached_pages(fd)
    os.pread(fd, length, start)
    assert cached_pages(fd) - before == min(-(-length // PAGE_SIZE), PAGES)


def ranges(parts: missing_parts.Parts) -> list[tuple[int, int]]:
    return [(part.start, part.start + part.length) for part in parts.read]


def test_what_is_cached_is_left_out(weights: int, whole: Extent) -> None:
    with parts_of(whole, None) as parts:
        assert (parts.read, parts.cached, parts.refused) == ([whole], 0, 0)
    cache(weights, CHUNK, CHUNK)
    with parts_of(whole, None) as parts:
        assert ranges(parts) == [(0, CHUNK), (2 * CHUNK, PAGES * PAGE_SIZE)]
        assert (parts.cached, parts.refused) == (CHUNK, 0)
    # A chunk of which a page is missing is read as a whole, so that it can be a huge page.
    cache(weights, 2 * CHUNK, CHUNK - PAGE_SIZE)
    with parts_of(whole, None) as parts:
        assert ranges(parts) == [(0, CHUNK), (2 * CHUNK, PAGES * PAGE_SIZE)]
    cache(weights, 3 * CHUNK - PAGE_SIZE, PAGE_SIZE)
    cache(weights, 3 * CHUNK, 100)
    with parts_of(whole, None) as parts:
        assert ranges(parts) == [(0, CHUNK)]
    cache(weights, 0, CHUNK)
    with parts_of(whole, None) as parts:
        assert (parts.read, parts.cached, parts.refused) == ([], PAGES * PAGE_SIZE, 0)


def test_chunks_begin_at_their_multiples(weights: int, whole: Extent) -> None:
    """A request may begin in the midst of one."""
    cache(weights, CHUNK - 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    late = Extent(whole.file, CHUNK - 2 * PAGE_SIZE, CHUNK, 1)
    with parts_of(late, None) as parts:
        assert ranges(parts) == [(CHUNK, 2 * CHUNK - 2 * PAGE_SIZE)]
        assert parts.cached == 2 * PAGE_SIZE


def test_memory_bounds_what_is_read(weights: int, whole: Extent) -> None:
    cache(weights, 0, CHUNK)
    with parts_of(whole, CHUNK + PAGE_SIZE + 5) as parts:
        assert ranges(parts) == [(CHUNK, CHUNK + PAGE_SIZE)]
        assert (parts.cached, parts.refused) == (CHUNK, PAGES * PAGE_SIZE - CHUNK - PAGE_SIZE)
    with parts_of(whole, PAGE_SIZE - 1) as parts:
        assert (parts.read, parts.cached, parts.refused) == ([], 0, PAGES * PAGE_SIZE)


def test_a_file_is_open_for_as_long_as_its_parts_are_looked_at(weights: int) -> None:
    opened: list[int] = []

    def opener() -> int:
        opened.append(os.dup(weights))
        return opened[-1]

    request = Extent(Source(opener), 0, SIZE, 1)
    with parts_of(request, None) as parts:
        assert parts.read[0].file.acquire() == opened[0]
        parts.read[0].file.release()
    assert len(opened) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_what_cannot_be_told_is_read(
    weights: int, whole: Extent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> int:
        raise FileNotFoundError

    with parts_of(Extent(Source(gone), 0, CHUNK, 1), PAGE_SIZE) as parts:
        assert ranges(parts) == [(0, PAGE_SIZE)]
        assert (parts.cached, parts.refused) == (0, CHUNK - PAGE_SIZE)

    def refuses(fd: int, start: int, length: int) -> int:
        raise PermissionError

    cache(weights, 0, SIZE)
    monkeypatch.setattr(missing_parts, "cached_pages", refuses)
    with parts_of(whole, None) as parts:
        assert parts.read == [whole] and not parts.cached
