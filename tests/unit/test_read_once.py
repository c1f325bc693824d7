# SPDX-License-Identifier: Apache-2.0
"""What prefetch() chooses to read, and that it is in the page cache then (cachestat(2))."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
