# SPDX-License-Identifier: Apache-2.0
"""The readahead hook on each path of the kernel that it covers, and on those it must not touch.

The policy `window` answers each question with the same window, so that what is resident
afterwards tells what the module made of the answer.  Sizes are primes where they can be.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from tests.vm.kernel import (
    attached,
    check,
    make_file,
    map_all,
    mapped,
    needs_huge_pages,
    read_all,
    read_pages,
    resident,
    test_policy,
    traced,
)

pytestmark = pytest.mark.vm

WINDOW = test_policy("window")
MISS, MARKER, FAULT, FAULT_SEQ, FAULT_MARKER, READ, MAP, TOUCH = range(1, 9)
PAGES = 4099
#: Where the folio with page 521, the marker's, can begin: ext4 has large ones since 6.16.
MARKED = (512, 520, 521)


@pytest.fixture
def file(mount: Path) -> Path:
    return make_file(mount / "weights", PAGES, tail=1021)


def test_default_reads_little(file: Path) -> None:
    read_pages(file, 0, 1)
    assert resident(file) <= 32  # read_ahead_kb is 128 here


def test_miss_reads_the_window(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009) as policy:
        read_pages(file, 7, 1)
        assert resident(file) == 1009
        assert resident(file, 7, 1009) == 1009
        assert policy.variable("kinds")[MISS] == 1
        assert policy.count("readahead_miss") == 1
        assert policy.count("readahead_bytes") == 1009 * PAGE_SIZE


def test_untagged_file_is_left_alone(file: Path, mount: Path) -> None:
    other = make_file(mount / "other", 1013)
    with attached(WINDOW, file, window_pages=1009) as policy:
        read_pages(other, 0, 1)
        assert resident(other) <= 32
        assert policy.count("readahead_calls") == 0


def test_untag_gives_the_file_back(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009) as policy:
        policy.untag(file)
        read_pages(file, 0, 1)
        assert resident(file) <= 32


def test_marker_asks_again(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009, mark_pages=521) as policy:
        read_pages(file, 0, 1)
        assert policy.variable("kinds")[MARKER] == 0
        read_pages(file, 521, 1)
        assert policy.variable("kinds")[MARKER] == 1
        assert resident(file) - 1009 in MARKED
        # The marker is gone: the same page again asks nobody.
        read_pages(file, 521, 1)
        assert policy.variable("kinds")[MARKER] == 1


def test_each_decision_is_a_trace_event(file: Path) -> None:
    with (
        attached(WINDOW, file, window_pages=1009, mark_pages=521) as policy,
        traced("pagecache_readahead") as events,
    ):
        read_pages(file, 0, 1)
        read_pages(file, 521, 1)
        seen = events()
        assert len(seen) == policy.count("readahead_calls") == 2
    assert [event["kind"] for event in seen] == ["miss", "marker"]
    marked = int(seen[1]["index"])
    assert marked in MARKED
    assert [(event["index"], event["start"], event["nr"]) for event in seen] == [
        ("0", "0", "1009"),
        (str(marked), str(marked), "1009"),
    ]
    assert [event["mark"] for event in seen] == ["521", str(marked + 521)]
    assert {event["ino"] for event in seen} == {str(file.stat().st_ino)}
    assert {event["policy"] for event in seen} == {"window"}


def test_fault_reads_the_window(file: Path) -> None:
    with attached(WINDOW, file, window_pages=503) as policy, mapped(file) as mapping:
        check(mapping[1000 * PAGE_SIZE : 1001 * PAGE_SIZE], 1000 * PAGE_SIZE)
        assert policy.variable("kinds")[FAULT] == 1
        assert resident(file, 1000, 503) == 503
        assert resident(file) == 503


def test_sequential_mapping(file: Path) -> None:
    with (
        attached(WINDOW, file, window_pages=503) as policy,
        mapped(file, mmap.MADV_SEQUENTIAL) as mapping,
    ):
        check(mapping[1000 * PAGE_SIZE : 1001 * PAGE_SIZE], 1000 * PAGE_SIZE)
        assert policy.variable("kinds")[FAULT_SEQ] == 1
        assert resident(file) == 503


def test_marker_reached_by_a_fault(file: Path) -> None:
    with (
        attached(WINDOW, file, window_pages=101, mark_pages=64) as policy,
        mapped(file) as mapping,
    ):
        check(mapping[:PAGE_SIZE], 0)
        check(mapping[64 * PAGE_SIZE : 65 * PAGE_SIZE], 64 * PAGE_SIZE)
        assert policy.variable("kinds")[FAULT_MARKER] == 1
        assert resident(file) == 64 + 101


def test_populated_mapping_has_right_bytes(file: Path) -> None:
    with attached(WINDOW, file, window_pages=503) as policy:
        fd = os.open(file, os.O_RDONLY)
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0x8000)
        mapping = mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ)
        os.close(fd)
        check(mapping[:], 0)
        mapping.close()
        assert policy.variable("kinds")[FAULT] >= PAGES // 503
        assert resident(file) == PAGES + 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda fd: os.posix_fadvise(fd, 0, 64 * PAGE_SIZE, os.POSIX_FADV_WILLNEED),
        lambda fd: mmap.mmap(fd, 0, prot=mmap.PROT_READ).madvise(
            mmap.MADV_WILLNEED, 0, 64 * PAGE_SIZE
        ),
    ],
    ids=["fadvise", "madvise"],
)
def test_explicit_requests_are_not_asked_about(file: Path, ask: object) -> None:
    """readahead(2) is fadvise(WILLNEED) inside the kernel, see ksys_readahead()."""
    assert callable(ask)
    with attached(WINDOW, file, window_pages=1009) as policy:
        fd = os.open(file, os.O_RDONLY)
        ask(fd)
        os.close(fd)
        assert policy.count("readahead_calls") == 0
        assert 0 < resident(file) <= 64


def test_advice_random_is_respected(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009) as policy:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        check(os.pread(fd, PAGE_SIZE, 100 * PAGE_SIZE), 100 * PAGE_SIZE)
        os.close(fd)
        with mapped(file, mmap.MADV_RANDOM) as mapping:
            check(mapping[200 * PAGE_SIZE : 201 * PAGE_SIZE], 200 * PAGE_SIZE)
        assert policy.count("readahead_calls") == 0
        assert resident(file) == 2


def test_direct_reads_never_ask(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009) as policy:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 64 * PAGE_SIZE)
        assert os.preadv(fd, [buffer], 0) == 64 * PAGE_SIZE
        os.close(fd)
        check(buffer[:], 0)
        assert policy.count("readahead_calls") == 0
        assert resident(file) == 0


def test_answers_are_cut_to_the_file(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1048576) as policy:
        read_pages(file, 4001, 1)
        assert resident(file) == PAGES + 1 - 4001
        assert policy.count("clamped_answers") == 1


def test_answers_are_cut_to_the_bound(mount: Path) -> None:
    big = make_file(mount / "big", 65 * 256)
    with attached(WINDOW, big, window_pages=1048576) as policy:
        read_pages(big, 0, 1)
        assert resident(big) == policy.device.info().max_answer_pages == 64 * 256
        assert policy.count("clamped_answers") == 1


def test_nothing_is_an_answer(file: Path) -> None:
    """A policy may leave everything to the reader: one page at a time, right bytes."""
    with attached(WINDOW, file, window_pages=0) as policy:
        read_pages(file, 11, 3)
        assert resident(file) == 3
        assert policy.count("invalid_answers") == 0


def test_unknown_node_is_any_node(file: Path) -> None:
    with attached(WINDOW, file, window_pages=101, node=1023) as policy:
        read_pages(file, 0, 1)
        assert resident(file) == 101
        assert policy.count("clamped_answers") == 1


def test_hook_runs_once_per_window(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009) as policy:
        read_all(file)
        assert policy.count("readahead_calls") == -(-(PAGES + 1) // 1009)
        assert resident(file) == PAGES + 1


def test_access_tells_each_read_and_fault(file: Path) -> None:
    with attached(WINDOW, file, window_pages=1009) as policy:
        for start in range(0, 23 * 29, 29):
            read_pages(file, start, 3)
        assert policy.variable("kinds")[READ] == 23
        drop([file])
        map_all(file)
        kinds = policy.variable("kinds")
        assert kinds[READ] == 23
        # Each fault maps the 16 pages around it (fault_around_bytes), or a large folio of up to 64.
        assert kinds[MAP] >= PAGES // 64
        assert kinds[TOUCH] >= PAGES // 1009


def test_resident_pages_are_exact(file: Path) -> None:
    read_pages(file, 0, 17)
    before = resident(file)
    with attached(WINDOW, file, window_pages=211) as policy:
        assert policy.status.governed_pages == before
        read_pages(file, 2003, 1)
        assert policy.status.governed_pages == resident(file) == before + 211
        assert policy.count("added_bytes") == 211 * PAGE_SIZE
        drop([file])
        assert policy.status.governed_pages == 0
        assert policy.count("removed_bytes") == (before + 211) * PAGE_SIZE
        (tag,) = policy.device.tags()
        assert tag.resident_pages == 0


@needs_huge_pages
def test_large_folios_on_xfs(xfs_mount: Path) -> None:
    """One folio is many pages: counts stay pages, contents stay right."""
    file = make_file(xfs_mount / "weights", PAGES, tail=1021)
    with attached(test_policy("maximal"), file) as policy:
        map_all(file)
        read_all(file)
        policy.idle()
        assert policy.status.governed_pages == resident(file)
        added = policy.variable("seen")[4]
        assert 0 < added < policy.count("added_bytes") // PAGE_SIZE
