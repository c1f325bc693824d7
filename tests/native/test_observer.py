# SPDX-License-Identifier: Apache-2.0
"""What the observer counts is what was read: known, prime numbers of pages, on this kernel."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.agent import worker
from pagecache_bpf.kernel.file_key import key_of
from tests.observing import (
    PAGE_SIZE,
    consistent,
    copy,
    counts,
    drop,
    observing,
    pages,
    pread,
    reader,
    stream,
    tag,
    touch,
)
from tests.vm.kernel import make_file

pytestmark = pytest.mark.native

PAGES = 4093


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file(tmp_path_factory.mktemp("observed") / "model.safetensors", PAGES)


@pytest.fixture
def file(made: Path) -> Iterator[Path]:
    """A cold file."""
    drop([made])
    yield made


@pytest.mark.parametrize("piece", [1 << 30, 128 << 10, 3 * PAGE_SIZE, 12_345])
def test_streams(file: Path, piece: int) -> None:
    """Cold: nothing hits.  Once more: everything does.  Whatever the size of the reads."""
    size = PAGES * PAGE_SIZE
    wanted = pages(*((at, min(piece, size - at)) for at in range(0, size, piece)))
    with observing(file) as observer:
        cold = counts(observer, reader(file, stream(piece)))
        consistent(counts(observer), file)
        assert cold.read == wanted
        assert cold.read_miss + cold.read_ahead == PAGES == cold.added
        assert cold.read_hit == wanted - PAGES  # pages that two reads share
        assert cold.demand == cold.read_miss
        warm = counts(observer, reader(file, stream(piece)))
        assert (warm.read, warm.read_hit, warm.added) == (wanted, wanted, 0)
        assert warm.read_stall_ns == 0 < cold.read_stall_ns


def test_reads_that_overlap_are_told_apart(file: Path) -> None:
    """Each call is one, though they want the same last page, or start within the one before."""
    ranges = [(0, 8), (5, 3), (6, 2), (7, 1), (7, 1), (3, 5), (0, 8), (100, 1), (99, 2), (101, 1)]
    spans = [(at * PAGE_SIZE, n * PAGE_SIZE) for at, n in ranges]
    with observing(file) as observer:
        reader(file, ["advise", 0, 0, os.POSIX_FADV_RANDOM], pread(*spans))
        found = counts(observer)
        consistent(found, file)
        assert found.read == sum(n for _, n in ranges)
        assert found.read_miss == 8 + 1 + 1 + 1
        assert found.read_hit == found.read - found.read_miss


def test_partial_and_random_reads(file: Path) -> None:
    some = random.Random(4711)
    size = PAGES * PAGE_SIZE
    spans = [(some.randrange(size - 20_000), some.randrange(1, 20_000)) for _ in range(997)]
    touched = {
        page for at, n in spans for page in range(at // PAGE_SIZE, -(-(at + n) // PAGE_SIZE))
    }
    with observing(file) as observer:
        reader(file, ["advise", 0, 0, os.POSIX_FADV_RANDOM], pread(*spans))
        found = counts(observer)
        consistent(found, file)
        assert found.read == pages(*spans)
        # Large folios bring more than was wanted.
        assert found.read_miss + found.read_ahead == len(touched) <= found.added
        assert found.read_hit == found.read - len(touched)


def test_first_touches_of_mappings(file: Path) -> None:
    with observing(file) as observer:
        cold = counts(observer, reader(file, touch()))
        consistent(counts(observer), file)
        assert abs(cold.mmap - PAGES) <= 0.01 * PAGES
        assert cold.mmap_hit <= 0.01 * PAGES and cold.mmap_miss > 0
        assert cold.mmap_stall_ns > 0 == cold.read
        warm = counts(observer, reader(file, touch()))
        assert abs(warm.mmap_hit - PAGES) <= 0.01 * PAGES
        assert (warm.mmap, warm.mmap_stall_ns) == (warm.mmap_hit, 0)
        twice = counts(observer, reader(file, touch(), touch()))
        assert abs(twice.mmap_hit - 2 * PAGES) <= 0.01 * PAGES


def test_mappings_are_told_from_the_memory_they_are_copied_to(file: Path) -> None:
    """In huge pages where the kernel makes them, whose faults only their area tells."""
    with observing(file) as observer:
        reader(file, copy(1 << 20, mmap.MADV_HUGEPAGE))
        steps = [copy(size, mmap.MADV_HUGEPAGE) for size in (1 << 20, 3 << 20)]
        warm = counts(observer, reader(file, *steps))
        assert abs(warm.mmap - 2 * PAGES) <= 0.01 * PAGES
        assert warm.mmap_miss == warm.added == 0


def test_huge_pages_that_were_there_before_are_seen(file: Path) -> None:
    """Faults are looked at only where a huge page can be mapped: it may be older than the tag."""
    reader(file, touch(advice=mmap.MADV_HUGEPAGE))
    with observing(file) as observer:
        warm = counts(observer, reader(file, touch()))
        assert abs(warm.mmap_hit - PAGES) <= 0.01 * PAGES
        assert warm.mmap_miss == warm.added == 0


def test_random_touches_are_misses(file: Path) -> None:
    places = [at * 64 * PAGE_SIZE for at in random.Random(7).sample(range(PAGES // 64), 53)]
    with observing(file) as observer:
        reader(file, touch(*places, advice=mmap.MADV_RANDOM))
        found = counts(observer)
        consistent(found, file)
        assert found.mmap_miss == 53
        assert found.demand == 53
        again = counts(observer, reader(file, touch(*places, advice=mmap.MADV_RANDOM)))
        assert again.mmap_miss == 0 and again.mmap_hit >= 53


def test_what_was_there_before_hits(file: Path) -> None:
    """Residency at the time of the tag is known page by page."""
    half = 2039
    reader(file, ["advise", 0, 0, os.POSIX_FADV_RANDOM], pread((0, half * PAGE_SIZE)))
    with observing(file) as observer:
        reader(file, pread((0, PAGES * PAGE_SIZE)))
        found = counts(observer)
        assert (found.read_hit, found.read_miss) == (half, PAGES - half)
        assert found.added == PAGES - half


def test_an_application_that_reads_ahead(file: Path) -> None:
    ahead = 509
    with observing(file) as observer:
        reader(file, ["readahead", 0, ahead * PAGE_SIZE], pread((0, 11 * PAGE_SIZE)))
        found = counts(observer)
        consistent(found, file)
        assert found.requested == found.added >= 11
        assert (found.read_ahead, found.read_miss) == (11, 0)


def test_prefetch_is_useful_or_wasted(file: Path) -> None:
    """This process is the observer's own: what it reads is prefetched, what it drops is dropped."""
    some, used = 1021, 499
    fd = os.open(file, os.O_RDONLY)
    with observing(file) as observer:
        worker.by_populate(fd, 0, some * PAGE_SIZE)
        found = counts(observer)
        assert found.prefetched == found.added >= some
        assert found.read == found.mmap == 0
        brought = found.prefetched
        reader(file, ["advise", 0, 0, os.POSIX_FADV_RANDOM], pread((0, used * PAGE_SIZE)))
        found = counts(observer)
        assert (found.read_hit, found.prefetch_useful + found.prefetch_late) == (used, used)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found = counts(observer)
        consistent(found, file)
        assert found.prefetch_wasted == brought - used
        assert (found.evicted_drop, found.removed) == (brought, brought)
    os.close(fd)


def test_evictions_have_causes(file: Path, tmp_path: Path) -> None:
    copy = make_file(tmp_path / "copy.safetensors", 1009)
    with observing(file, copy) as observer:
        reader(file, stream(), ["advise", 0, 0, os.POSIX_FADV_DONTNEED])
        found = counts(observer)
        assert found.evicted_fadvise == found.removed == found.added == PAGES
        reader(copy, stream())
        os.truncate(copy, 503 * PAGE_SIZE)
        assert counts(observer).evicted_truncate == 1009 - 503
        copy.unlink()
        found = counts(observer)
        consistent(found, file)
        assert found.evicted_truncate == 1009
        (model,) = observer.snapshot()["models"]
        assert (model["files"], model["gone"], model["bytes"]) == (2, 1, PAGES * PAGE_SIZE)


def test_a_file_that_is_replaced_is_another(file: Path, tmp_path: Path) -> None:
    copy = make_file(tmp_path / "copy.safetensors", 101)
    with observing(copy) as observer:
        copy.rename(tmp_path / "old")
        reader(make_file(copy, 211), stream())
        found = counts(observer)
        assert found.read == found.added == 0
        assert observer.snapshot()["models"][0]["gone"] == 1


def test_waits_for_other_files_are_not_ours(file: Path, tmp_path: Path) -> None:
    other = make_file(tmp_path / "other", 4093)
    reader(file, stream())
    with observing(file) as observer:
        reader(file, ["other", str(other), 64 << 10], stream(), touch())
        found = counts(observer)
        assert found.read_hit == PAGES
        assert found.read_stall_ns == found.mmap_stall_ns == 0


def test_untagged_files_count_nothing(file: Path) -> None:
    with observing(file) as observer:
        with file.open("rb") as opened:
            assert observer.untag_fd(opened.fileno()) and not observer.untag_fd(opened.fileno())
        reader(file, stream(), touch())
        assert not any(counts(observer).values())
        tag(observer, file, "test")
        reader(file, stream())
        assert counts(observer).read_hit == PAGES


def test_consumers_and_models_are_kept_apart(file: Path, tmp_path: Path) -> None:
    other = make_file(tmp_path / "other.safetensors", 307)
    with observing(file) as observer:
        tag(observer, other, "other")
        one = reader(file, pread((0, 7 * PAGE_SIZE)))
        two = reader(file, pread((0, 13 * PAGE_SIZE)))
        reader(other, stream())
        shown = {model["model"]: model for model in observer.snapshot()["models"]}
        read = {
            consumer["tgid"]: consumer["counters"]["read_bytes"] // PAGE_SIZE
            for consumer in shown["test"]["consumers"]
        }
        assert read == {one: 7, two: 13}
        assert shown["test"]["counters"]["read_bytes"] == 20 * PAGE_SIZE
        assert shown["other"]["counters"]["read_bytes"] == 307 * PAGE_SIZE
        assert shown["other"]["resident_bytes"] == 307 * PAGE_SIZE
        assert not any(consumer["alive"] for consumer in shown["test"]["consumers"])


def test_moves_are_recorded(file: Path) -> None:
    spans = [(at * PAGE_SIZE, 3 * PAGE_SIZE) for at in (0, 1009, 17, 2003, 17)]
    with observing(file, moves="all") as observer:
        found: list[tuple[int, int]] = []
        pid = reader(file, pread(*spans))
        with file.open("rb") as opened:
            key = key_of(opened.fileno())

        def receive(move: object) -> None:
            assert bytes(move.file) == key and move.tgid == pid  # type: ignore[attr-defined]
            found.append((move.index, move.nr))  # type: ignore[attr-defined]

        observer.poll(receive, 1000)
        assert found == [(at // PAGE_SIZE, 3) for at, _ in spans]


def test_moves_that_find_no_room_are_counted(file: Path) -> None:
    rounds = 5
    with observing(file, moves="all") as observer:
        reader(file, *[stream(PAGE_SIZE)] * rounds)
        lost = observer.snapshot()["lost_events"]
        found: list[object] = []
        observer.poll(found.append, 1000)
        assert lost > 0 and lost + len(found) == rounds * PAGES


def test_without_the_tracepoints_of_accesses(file: Path) -> None:
    """As on Linux before 6.12: what comes and goes is counted, and the rest is said to be not."""
    missing = ["mm_filemap_fault", "mm_filemap_get_pages", "mm_filemap_map_pages"]
    with observing(file, without=missing) as observer:
        reader(file, stream(), ["advise", 0, 0, os.POSIX_FADV_DONTNEED])
        shown = observer.snapshot()
        assert (shown["level"], shown["missing"]) == ("degraded", missing)
        found = counts(observer)
        assert found.added == found.removed == found.evicted_fadvise == PAGES
        assert not any(found[name.removesuffix("_bytes")] for name in shown["uncounted"])
