# SPDX-License-Identifier: Apache-2.0
"""cachestat(2), verified eviction and the sampler, on a real file of this machine."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cachestat import (
    PAGE_SIZE,
    NotCold,
    Sampler,
    cachestat,
    drop,
    resident_bytes,
    resident_pages,
)
from pagecache_bpf.errors import UnsupportedError

PAGES = 257  # a prime: no rounding comes out at it


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[Path]:
    """A file of PAGES pages that was just read; skips where its pages cannot be evicted."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(PAGES * PAGE_SIZE))
    try:
        drop([path])
    except UnsupportedError as error:
        pytest.skip(str(error))
    except NotCold:
        pytest.skip(f"the file system of {tmp_path} keeps its pages (tmpfs?)")
    path.read_bytes()
    yield path


def test_counts_resident_pages(cached: Path) -> None:
    assert resident_pages(cached) == PAGES
    assert resident_bytes([cached, cached]) == 2 * PAGES * PAGE_SIZE


def test_range_counts_only_its_pages(cached: Path) -> None:
    with cached.open("rb") as file:
        assert cachestat(file.fileno(), 10 * PAGE_SIZE, 7 * PAGE_SIZE).cached == 7


def test_dirty_pages_are_seen_and_written_back_by_drop(cached: Path) -> None:
    with cached.open("r+b") as file:
        file.write(b"x" * (3 * PAGE_SIZE))
        file.flush()
        assert cachestat(file.fileno()).dirty >= 3
    drop([cached])
    assert resident_pages(cached) == 0
    assert cached.read_bytes()[: 3 * PAGE_SIZE] == b"x" * (3 * PAGE_SIZE)


def test_drop_refuses_to_call_a_mapped_file_cold(cached: Path) -> None:
    with cached.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert len(mapped[5 * PAGE_SIZE : 6 * PAGE_SIZE]) == PAGE_SIZE
        with pytest.raises(NotCold, match="pages stayed in the page cache"):
            drop([cached], timeout_s=0.05)
    drop([cached])
    assert resident_pages(cached) == 0


def test_bad_descriptor_is_an_os_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        cachestat(-1)


def test_sampler_sees_the_file_come_in(cached: Path) -> None:
    drop([cached])
    with Sampler([cached], interval_s=0.005) as sampler:
        begun = time.monotonic()
        cached.read_bytes()
        time.sleep(0.1)
    first, last = sampler.samples[0], sampler.samples[-1]
    assert first.resident == 0
    assert first.at_s <= begun
    assert last.resident == PAGES * PAGE_SIZE
    times = [sample.at_s for sample in sampler.samples]
    assert times == sorted(times)


def test_sampler_reports_a_file_it_cannot_open(tmp_path: Path) -> None:
    from pagecache_bpf.errors import PagecacheError

    with pytest.raises(PagecacheError, match="sampler died"), Sampler([tmp_path / "absent"]):
        pass
