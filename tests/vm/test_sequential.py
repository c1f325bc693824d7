# SPDX-License-Identifier: Apache-2.0
"""The policy `sequential`: streams get a window, everything else the kernel's own readahead."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from benchmarks.guest.cgroups import group, reclaim_by, stretch
from tests.vm.kernel import (
    INTERPRETER,
    MAPPED_LOADER,
    Policy,
    attached,
    check,
    lending,
    make_file,
    map_all,
    mapped,
    read_all,
    read_pages,
    resident,
)

pytestmark = pytest.mark.vm

PAGES = 8191
SHARDS = 9


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "weights", PAGES)


def ahead(policy: Policy, file: Path, pages: int) -> int:
    """Pages resident after a stream of `pages` pages in the file's first half has stopped."""
    with file.open("rb", buffering=0) as reader:
        for index in range(pages):
            check(reader.read(PAGE_SIZE), index * PAGE_SIZE)
        policy.idle()
        return resident(file) - pages


@pytest.mark.parametrize("reader", [read_all, map_all])
def test_streams_are_read_ahead(file: Path, reader: object) -> None:
    assert callable(reader)
    with attached("sequential", file) as policy:
        reader(file)
        assert policy.count("prefetch_bytes") > 0.5 * PAGES * PAGE_SIZE
        # memcpy() from a mapping touches the last page of a piece first: that is no stream yet.
        assert policy.count("readahead_default") <= 6
        assert resident(file) == PAGES


@pytest.mark.parametrize("piece", [256, 2048, PAGES])
def test_pieces_that_are_copied_from_their_ends_are_read_ahead(file: Path, piece: int) -> None:
    """So does memcpy(), where source and destination lie alike in their pages."""
    with attached("sequential", file) as policy, mapped(file) as mapping:
        for start in range(0, PAGES, piece):
            end = min(start + piece, PAGES)
            for index in (start, *reversed(range(start + 1, end))):
                at = index * PAGE_SIZE
                check(mapping[at : at + PAGE_SIZE], at)
        policy.idle()
        assert policy.count("prefetch_bytes") > 0.5 * PAGES * PAGE_SIZE
        assert policy.count("readahead_default") <= 12
        # Where it reads around a fault, the kernel alone is asked about every 16 pages.
        assert policy.count("readahead_fault") < PAGES / 16 / 4
        assert resident(file) == PAGES


def test_a_second_pass_is_read_ahead_too(file: Path) -> None:
    """What was asked for once may be gone: asked again through the same open file."""
    with attached("sequential", file) as policy, file.open("rb", buffering=0) as reader:
        asked = []
        for _ in range(3):
            before = policy.count("prefetch_bytes")
            reader.seek(0)
            for index in range(0, PAGES, 32):
                check(reader.read(32 * PAGE_SIZE), index * PAGE_SIZE)
            policy.idle()
            asked.append(policy.count("prefetch_bytes") - before)
            drop([file])
        assert min(asked) > 0.5 * PAGES * PAGE_SIZE, asked


def test_one_access_is_no_stream(file: Path) -> None:
    with attached("sequential", file) as policy:
        read_pages(file, 0, 1)
        assert resident(file) <= 32
        assert policy.count("prefetch_calls") == 0


def test_the_window_follows_the_cursor(file: Path) -> None:
    """A reader that stops finds at most a window ahead, not the file."""
    with attached("sequential", file, start_window_kib=1024, max_window_mib=1) as policy:
        assert 0 < ahead(policy, file, 401) <= 256 + 64


def test_the_window_has_a_limit(file: Path) -> None:
    with attached("sequential", file, start_window_kib=64, max_window_mib=4) as policy:
        assert ahead(policy, file, 2003) <= 4 * 256 + 64


@pytest.mark.parametrize("lists", ["classic", "generations"])
def test_a_small_cgroup_bounds_the_window(mount: Path, lists: str) -> None:
    """What is read ahead is not pushed out before the reader comes to it."""
    path = stretch(mount / "large", 80)
    drop([path])
    with (
        reclaim_by(lists),
        attached("sequential", path) as policy,
        group("small", max=40 << 20) as it,
    ):
        it.read(path)
        policy.idle()
        assert policy.count("prefetch_bytes") > 0.5 * (80 << 20)
        assert policy.count("added_bytes") <= 1.05 * (80 << 20)


@pytest.mark.parametrize("percent", [45, 30])
def test_a_mapped_stream_in_a_small_cgroup_reads_nothing_twice(mount: Path, percent: int) -> None:
    """The kernel keeps what was used, which is mapped; the policy what is used next."""
    pages = 2 * PAGES
    file = make_file(mount / "weights", pages)
    limit = pages * PAGE_SIZE * percent // 100 + INTERPRETER
    with group("small", max=limit) as memory, attached("sequential", file) as policy:
        whole = json.dumps([(0, pages)])
        assert memory.run(sys.executable, "-I", "-S", "-c", MAPPED_LOADER, str(file), whole) == 0
        policy.idle()
        assert policy.count("evicted_now_bytes") > 0
        assert policy.count("added_bytes") <= 1.01 * pages * PAGE_SIZE


def test_what_was_streamed_long_ago_is_the_kernels(mount: Path) -> None:
    """A model that was loaded is in use, or is not: only its reader's coming and going tells."""
    file, other = make_file(mount / "weights", PAGES), stretch(mount / "other", 96)
    with group("small", max=48 << 20) as memory, attached("sequential", file) as policy:
        memory.read(file)
        time.sleep(2.5)  # a reader that was not heard of for two seconds reads no more
        before = policy.count("evict_calls")
        memory.read(other)
        assert policy.count("evict_calls") > before
        assert policy.count("evicted_now_bytes") == policy.count("kept_bytes") == 0


def test_budget_stops_prefetch(file: Path) -> None:
    with attached("sequential", file, budget_mib=4) as policy:
        read_all(file, PAGE_SIZE * 8)
        assert policy.count("prefetch_bytes") <= 4 << 20
        assert policy.count("readahead_default") > 10


def random_reads(file: Path, through_mmap: bool) -> None:
    order = random.Random(1)
    if through_mmap:
        with mapped(file) as mapping:
            for _ in range(211):
                at = order.randrange(PAGES) * PAGE_SIZE
                check(mapping[at : at + PAGE_SIZE], at)
        return
    fd = os.open(file, os.O_RDONLY)
    for _ in range(211):
        at = order.randrange(PAGES) * PAGE_SIZE
        check(os.pread(fd, PAGE_SIZE, at), at)
    os.close(fd)


@pytest.mark.parametrize("through_mmap", [False, True], ids=["read", "mmap"])
def test_random_readers_are_not_punished(file: Path, through_mmap: bool) -> None:
    random_reads(file, through_mmap)
    default = resident(file)
    drop([file])
    with attached("sequential", file) as policy:
        random_reads(file, through_mmap)
        policy.idle()
        assert resident(file) <= 1.05 * default


def test_two_cursors_in_one_open_file(file: Path) -> None:
    with attached("sequential", file) as policy:
        fd = os.open(file, os.O_RDONLY)
        for index in range(0, 2000, 8):
            for base in (0, 4000):
                at = (base + index) * PAGE_SIZE
                check(os.pread(fd, 8 * PAGE_SIZE, at), at)
        os.close(fd)
        policy.idle()
        assert policy.count("readahead_default") <= 8
        assert policy.count("prefetch_bytes") > 2000 * PAGE_SIZE


def test_a_streamed_model_is_trusted(mount: Path) -> None:
    """The third shard of a model starts with the window that the others ended with."""
    shards = [make_file(mount / f"shard-{i}", 2053) for i in range(3)]
    with attached("sequential", *shards, start_window_kib=1024) as policy:
        for shard in shards[:2]:
            read_all(shard)
        before = policy.count("readahead_default")
        read_pages(shards[2], 0, 1)
        assert policy.count("readahead_default") == before
        assert resident(shards[2]) >= 64


@pytest.mark.parametrize("session", [True, False])
def test_the_window_goes_on_into_the_next_shard(mount: Path, session: bool) -> None:
    """Before its first access, and only what will be read; in the order of the loan."""
    shards = [mount / f"shard-{number}" for number in range(SHARDS)]
    for number, path in enumerate(shards):
        make_file(path, 2048 + number)
    before = []
    with attached("sequential", *shards) as policy, lending(*shards[: SHARDS * session]):
        for path in shards:
            policy.idle()
            before.append(resident(path))
            read_all(path)
        policy.idle()
        assert [resident(path) for path in shards] == [2048 + n for n in range(SHARDS)]
        assert policy.count("added_bytes") == sum(path.stat().st_size for path in shards)
        assert policy.count("removed_bytes") == 0
        assert bool(policy.count("prefetch_lent_bytes")) == session
    assert before[0] == 0
    if session:
        assert all(pages >= 512 for pages in before[1:]), before
    else:
        assert not any(before)


def test_small_files_are_read_ahead_as_a_whole_in_a_session(mount: Path) -> None:
    """One that fits into the window is there before anybody opens it, and so is its last page."""
    shards = [make_file(mount / f"shard-{number}", 1025 + number) for number in range(SHARDS)]
    before = []
    with attached("sequential", *shards, start_window_kib=6144) as policy, lending(*shards):
        for path in shards:
            policy.idle()
            before.append(resident(path))
            read_all(path)
        policy.idle()
        assert policy.count("added_bytes") == sum(path.stat().st_size for path in shards)
        assert policy.count("readahead_miss") <= 3
    assert before == [0, *(1025 + number for number in range(1, SHARDS))]
