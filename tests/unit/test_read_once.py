# SPDX-License-Identifier: Apache-2.0
"""What prefetch() chooses to read, and that it is in the page cache then (cachestat(2))."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagecache_bpf.agent import worker
from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.loads import read_once
from pagecache_bpf.loads.read_once import wanted

SIZE = 10 * PAGE_SIZE + 7


@pytest.fixture
def files(disk: Path) -> list[Path]:
    found = [disk / "a", disk / "b"]
    for path in found:
        path.write_bytes(bytes(SIZE))
    return found


def test_all_of_the_files_within_the_budget(files: list[Path]) -> None:
    first, second = files
    assert wanted(files, None, 1 << 30) == [(first, [(0, SIZE)]), (second, [(0, SIZE)])]
    assert wanted(files, None, SIZE + 5) == [(first, [(0, SIZE)]), (second, [(0, 5)])]
    assert wanted(files, None, SIZE) == [(first, [(0, SIZE)])]
    assert wanted(files, None, 0) == []


def test_ranges_begin_at_pages(files: list[Path]) -> None:
    ranges = [(PAGE_SIZE + 1, 10), (SIZE, 0), (SIZE - 1, 1)]
    assert wanted(files[:1], ranges, None) == [(files[0], [(PAGE_SIZE, 11), (10 * PAGE_SIZE, 7)])]


@pytest.mark.parametrize("bad", [(-1, 1), (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (5, -1)])
def test_ranges_outside_of_a_file_are_refused(files: list[Path], bad: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"it has {SIZE} bytes"):
        wanted(files, [bad], None)


def test_without_a_budget_half_of_the_free_memory(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_once, "free_memory", lambda: 2 * PAGE_SIZE + 1)
    assert wanted(files, None, None) == [(files[0], [(0, PAGE_SIZE)])]


def test_what_was_read_is_cached(files: list[Path]) -> None:
    path = files[0]
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert cached_pages(fd) == 0
        read = read_once.read(path, [(0, PAGE_SIZE), (4 * PAGE_SIZE, 2 * PAGE_SIZE)], None)
        assert read == 3 * PAGE_SIZE
        assert cached_pages(fd, 0, PAGE_SIZE) == 1
        assert cached_pages(fd, 4 * PAGE_SIZE, 2 * PAGE_SIZE) == 2
    finally:
        os.close(fd)


def test_a_file_that_is_gone_is_no_error_of_the_read(tmp_path: Path) -> None:
    assert read_once.read(tmp_path / "gone", [(0, PAGE_SIZE)], None) == 0


@pytest.mark.parametrize(
    ("functions", "huge_pages", "pieces"),
    [
        (b"\0page_cache_ra_order\0", True, 0),
        (b"\0page_cache_ra_unbounded\0", True, 4),  # before 5.18
        (b"\0page_cache_ra_order\0", False, 4),  # PREEMPT_RT
        (None, True, 4),
    ],
)
def test_a_chunk_is_read_ahead_of_where_touching_it_reads_single_pages(
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    functions: bytes | None,
    huge_pages: bool,
    pieces: int,
) -> None:
    path = disk / "chunk"
    path.write_bytes(bytes(worker.CHUNK_BYTES))
    if functions is not None:
        (tmp_path / "vmlinux").write_bytes(functions)
    monkeypatch.setattr(worker, "_BTF", str(tmp_path / "vmlinux"))
    monkeypatch.setattr(worker, "_HUGE_PAGES", str(disk if huge_pages else disk / "none"))
    read = worker.by_readahead
    asked: list[int] = []

    def by_readahead(fd: int, start: int, length: int) -> None:
        asked.append(length)
        read(fd, start, length)

    monkeypatch.setattr(worker, "by_readahead", by_readahead)
    worker._has_huge_reads.cache_clear()
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            worker.by_populate(file.fileno(), 0, worker.CHUNK_BYTES)
            assert cached_pages(file.fileno()) == worker.CHUNK_BYTES // PAGE_SIZE
    finally:
        worker._has_huge_reads.cache_clear()
    assert len(asked) == pieces and sum(asked) in (0, worker.CHUNK_BYTES)


def cold(path: Path) -> int:
    """A file of one chunk that is not cached, open."""
    path.write_bytes(bytes(worker.CHUNK_BYTES))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_pages(fd) == 0
    return fd


def test_small_folios_are_waited_for_without_mapping_them(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To map each page of a chunk took half as long again as to read it."""
    fd = cold(disk / "chunk")
    monkeypatch.setattr(worker._libc, "mmap", lambda *_: pytest.fail("mapped"))
    try:
        worker.by_populate(fd, 0, worker.CHUNK_BYTES, huge=False)
        assert cached_pages(fd) == worker.CHUNK_BYTES // PAGE_SIZE
    finally:
        os.close(fd)


@pytest.mark.parametrize("most", [0, PAGE_SIZE, 128 << 10])
def test_what_the_kernel_cuts_off_a_readahead_is_read_all_the_same(
    disk: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    fd = cold(disk / "chunk")
    read = worker.by_readahead
    monkeypatch.setattr(
        worker, "by_readahead", lambda fd, start, length: read(fd, start, min(length, most))
    )
    try:
        worker.by_populate(fd, 0, worker.CHUNK_BYTES, huge=False)
        assert cached_pages(fd) == worker.CHUNK_BYTES // PAGE_SIZE
    finally:
        os.close(fd)
