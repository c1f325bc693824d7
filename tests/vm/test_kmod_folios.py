# SPDX-License-Identifier: Apache-2.0
"""Large folios: drops and shortage reach each of them, and mappings that want them get them."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from benchmarks.guest.cgroups import Group, fill, group, stretch
from benchmarks.guest.devices import ScaledDevice
from tests.vm.conftest import device
from tests.vm.kernel import (
    attached,
    check,
    make_file,
    mapped,
    needs_huge_pages,
    resident,
    test_policy,
    traced,
    wait_for,
)

pytestmark = [pytest.mark.vm, needs_huge_pages]

WINDOW = test_policy("window")
FAULT = 3
PAGES = 4099
MIB = 1 << 20
#: Orders of folios of 64 KiB, 256 KiB and 2 MiB.
ORDERS = pytest.mark.parametrize("order", [4, 6, 9])


@contextmanager
def in_folios(file: Path, order: int) -> Iterator[None]:
    """What the block reads of the file comes into the cache in folios of this order."""
    pages = file.stat().st_size // PAGE_SIZE
    with (
        traced("mm_filemap_add_to_page_cache", "filemap") as added,
        attached(WINDOW, file, window_pages=pages, order=order),
    ):
        yield
        sizes = Counter(int(fields["order"]) for fields in added())
    assert sizes[order] << order >= pages * 9 // 10, sizes


@ORDERS
def test_drops_leave_no_large_folio_behind(xfs_mount: Path, order: int) -> None:
    """Of an extent that begins and ends anywhere, all folios that lie in it go, and no other."""
    file = make_file(xfs_mount / "weights", 3 * 4096)
    with in_folios(file, order):
        assert len(file.read_bytes()) == 3 * 4096 * PAGE_SIZE  # none is under I/O any more
    drop_pages, end = 5000, 9001
    folio = 1 << order
    with attached(WINDOW, file, window_pages=16384, drop_pages=drop_pages) as policy:
        fd = os.open(file, os.O_RDONLY)
        os.pread(fd, 1, end * PAGE_SIZE)
        policy.idle()
        wait_for(lambda: policy.count("drop_bytes") > 0, "the drop")
        first = (end - drop_pages + folio - 1) // folio * folio
        last = end // folio * folio
        wait_for(lambda: resident(file, first, last - first) == 0, "every folio in it to go")
        assert resident(file) == 3 * 4096 - (last - first)
        os.close(fd)


@pytest.fixture
def memory() -> Iterator[Group]:
    with group("pcbfolios", max=48 * MIB) as it:
        yield it


@ORDERS
def test_a_shortage_reaches_large_folios(xfs_mount: Path, memory: Group, order: int) -> None:
    """What a policy gives when its cgroup is short goes, in whatever folios it lies."""
    weights = fill(xfs_mount / "weights", 16)
    stream = stretch(xfs_mount / "stream", 96)
    pages = 16 * MIB // PAGE_SIZE
    start, end = 100, 2400  # inside folios, which stay
    folio = 1 << order
    first, last = (start + folio - 1) // folio * folio, end // folio * folio
    memory.read_part(stream, 0, 26)
    with in_folios(weights, order):
        memory.read(weights)
        assert resident(weights) == pages
    with attached(
        test_policy("pressure_drop"), weights, drop_start=start, drop_pages=end - start
    ) as policy:
        memory.read_part(stream, 48, 8)
        wait_for(lambda: policy.count("pressure_dropped_bytes"), "something to be dropped")
        wait_for(lambda: resident(weights, first, last - first) == 0, "every folio in it to go")
        assert resident(weights, end) > (pages - end) * 9 // 10


@contextmanager
def read_ahead(scaled: ScaledDevice, kib: int) -> Iterator[None]:
    scaled.set_read_ahead_kb(kib)
    try:
        yield
    finally:
        scaled.set_read_ahead_kb(128)


def test_huge_page_mappings_are_left_alone_whatever_the_window(xfs_mount: Path) -> None:
    """MADV_HUGEPAGE asks for 4 MiB at once; a device may well have a larger window."""
    with read_ahead(device(1, "xfs"), 8192):
        file = make_file(xfs_mount / "weights", PAGES)
        with attached(WINDOW, file, window_pages=101) as policy:
            with mapped(file, mmap.MADV_HUGEPAGE) as mapping:
                check(mapping[3000 * PAGE_SIZE : 3001 * PAGE_SIZE], 3000 * PAGE_SIZE)
            assert policy.variable("kinds")[FAULT] == 0
            drop([file])
            with mapped(file) as mapping:
                check(mapping[3000 * PAGE_SIZE : 3001 * PAGE_SIZE], 3000 * PAGE_SIZE)
            assert policy.variable("kinds")[FAULT] == 1
