# SPDX-License-Identifier: Apache-2.0
"""What the policy `maio` has to do, whichever engine runs it; tests/vm and tests/native run it.

Files have known contents and readers check every byte.  The reader is this process, so it is
one consumer, unless a case forks.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from benchmarks.cachestat import PAGE_SIZE, drop
from pagecache_bpf.templates import EXTENT, Template
from pagecache_bpf.templates.policy_arrays import TemplateReplay
from pagecache_bpf.templates.traces import describe
from tests.vm.kernel import check, make_file, resident, wait_for

PAGES = 8191
MIB = (1 << 20) // PAGE_SIZE
#: The kernel's own window, and what one answer reads.
SLACK = 96

Range = tuple[int, int, int]  # file, first page, pages


class Attached(Protocol):
    """An attached maio."""

    def count(self, counter: str) -> int:
        """One counter."""

    def idle(self) -> None:
        """Wait until nothing is on its way."""

    def replay(self) -> TemplateReplay:
        """How its template does."""


class Engine(Protocol):
    """Attaches maio with a template for these files."""

    #: Whether other files than the one that is read can be prefetched.
    across: bool
    #: Pages that the kernel by itself reads behind the end of each piece.
    beyond: int

    def attach(
        self, template: Template | None, files: Sequence[Path], **knobs: int
    ) -> AbstractContextManager[Attached]:
        """In the block."""


def template_of(files: Sequence[Path], *consumers: Sequence[Range]) -> Template:
    """A template of ranges of pages."""
    sizes = [path.stat().st_size for path in files]
    rows = []
    for consumer, ranges in enumerate(consumers):
        for file, start, pages in ranges:
            length = min(pages * PAGE_SIZE, sizes[file] - start * PAGE_SIZE)
            rows.append((consumer, file, start * PAGE_SIZE, length, length))
    names = tuple(f"rank {number}" for number in range(len(consumers)))
    described = tuple(describe(path, path.name) for path in files)
    return Template(described, names, np.array(rows, EXTENT), "recorded", "test")


def backwards(pages: int = PAGES, piece: int = 512) -> list[Range]:
    """The pieces of a file from its end to its front, each from front to back."""
    starts = range(0, pages, piece)
    return [(0, start, min(piece, pages - start)) for start in reversed(starts)]


def read(fd: int, start: int, pages: int, piece: int = 32) -> None:
    """Read a range of pages, and check it."""
    for page in range(start, start + pages, piece):
        many = min(piece, start + pages - page)
        check(os.pread(fd, many * PAGE_SIZE, page * PAGE_SIZE), page * PAGE_SIZE)


def _in_a_process(file: Path, ranges: Sequence[Range]) -> None:
    """Read these ranges as a process of its own does."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            fd = os.open(file, os.O_RDONLY)
            for _, start, pages in ranges:
                read(fd, start, pages)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


class Cases:
    """The tests of one engine.  Who inherits them has a fixture `place`: a directory."""

    engine: Engine

    @pytest.fixture
    def file(self, place: Path) -> Path:
        """One with known contents."""
        return make_file(place / "weights.safetensors", PAGES)

    @pytest.mark.parametrize("through_mmap", [False, True], ids=["read", "mmap"])
    def test_the_order_is_followed(self, file: Path, through_mmap: bool) -> None:
        """What comes next in the template is read ahead, as far as the window goes, no more."""
        order = backwards()
        with self.engine.attach(template_of([file], order), [file], window_mib=8) as policy:
            drop([file])
            with file.open("rb") as opened:
                fd = opened.fileno()
                first = order[0]
                if through_mmap:
                    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
                        at = first[1] * PAGE_SIZE
                        check(mapping[at : at + 16 * PAGE_SIZE], at)
                        policy.idle()
                else:
                    read(fd, first[1], 16)
                    policy.idle()
                assert resident(file, *first[1:]) >= first[2] - 1
                assert resident(file, *order[1][1:]) == order[1][2]
                # 8 MiB from the start of the first piece on
                beyond = order[1 + 8 * MIB // 512][1]
                assert resident(file, 0, beyond) <= SLACK
                assert 7 * MIB <= resident(file) <= 8 * MIB + SLACK
                for _, start, pages in order:
                    read(fd, start, pages)
            policy.idle()
            assert resident(file) == PAGES
            replay = policy.replay()
            assert replay.accuracy == 1.0 and replay.jumps == 0 and not replay.dropped
            # each page came once
            assert policy.count("added_bytes") - policy.count("removed_bytes") <= PAGES * PAGE_SIZE

    def test_the_window_is_never_exceeded(self, file: Path) -> None:
        """A consumer that is throttled, stops and goes on never has more than the window ahead."""
        order = backwards(piece=256)
        window = 4 * MIB
        with self.engine.attach(template_of([file], order), [file], window_mib=4) as policy:
            drop([file])
            fd = os.open(file, os.O_RDONLY)
            done, most = 0, 0
            for number, (_, start, pages) in enumerate(order[:20]):
                for page in range(start, start + pages, 32):
                    many = min(32, start + pages - page)
                    read(fd, page, many)
                    done += many
                    ahead = resident(file) - done
                    most = max(most, ahead)
                    assert ahead <= window + SLACK
                if number in (5, 12):  # it stops: what was asked for arrives, and no more
                    policy.idle()
                    assert 0 < resident(file) - done <= window + SLACK
            os.close(fd)
            assert most > window // 2, "the window was never used"

    def test_a_jump_moves_the_window(self, file: Path) -> None:
        """A jump forgets what is queued; the window goes on from there."""
        order = backwards(piece=256)
        with self.engine.attach(template_of([file], order), [file], window_mib=2) as policy:
            drop([file])
            fd = os.open(file, os.O_RDONLY)
            read(fd, order[0][1], 32)
            policy.idle()
            _, start, pages = order[20]
            read(fd, start, 32)
            policy.idle()
            assert resident(file, start, pages) == pages
            assert resident(file, *order[21][1:]) == order[21][2]
            assert resident(file, *order[12][1:]) <= SLACK  # was passed over
            os.close(fd)
            assert policy.replay().jumps == 1

    def test_a_step_that_is_come_upon_by_chance_is_no_jump(self, file: Path) -> None:
        """Who reads here and there reads the first pages of a tensor, too, once in a while."""
        order = backwards(piece=256)
        with self.engine.attach(template_of([file], order), [file], window_mib=2) as policy:
            drop([file])
            fd = os.open(file, os.O_RDONLY)
            read(fd, order[0][1], 32)
            for number in (5, 9, 14, 17):
                read(fd, order[number][1] + 100, 32)
            read(fd, order[20][1], 32)
            policy.idle()
            assert resident(file, *order[20][1:]) < 200  # the kernel's own readahead
            assert resident(file, *order[21][1:]) <= SLACK
            os.close(fd)
            assert policy.replay().jumps == 0

    def test_single_accesses_elsewhere_are_no_jumps(self, file: Path) -> None:
        """They are no jumps: memcpy() begins with the end, loaders with headers."""
        with self.engine.attach(
            template_of([file], [(0, 0, PAGES)]), [file], window_mib=4
        ) as policy:
            drop([file])
            with file.open("rb") as opened:
                fd = opened.fileno()
                read(fd, 0, 32)
                for page in (PAGES - 1, PAGES // 2, PAGES - 600):
                    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
                        check(mapping[page * PAGE_SIZE : (page + 1) * PAGE_SIZE], page * PAGE_SIZE)
                    policy.idle()
                    assert resident(file, page - 512, 512) <= SLACK
                    read(fd, 32, 32)
                policy.idle()
                assert resident(file, 0, 4 * MIB) == 4 * MIB
                read(fd, 64, PAGES - 64)
            policy.idle()
            replay = policy.replay()
            assert replay.jumps == 0 and not replay.dropped
            assert replay.accuracy is not None and replay.accuracy > 0.99

    def test_going_down_through_a_range(self, file: Path) -> None:
        """As memcpy() may, from its end: one jump to there, and a window below it."""
        with self.engine.attach(
            template_of([file], [(0, 0, PAGES)]), [file], window_mib=4
        ) as policy:
            drop([file])
            before = policy.count("prefetch_bytes")
            with (
                file.open("rb") as opened,
                mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as copy,
            ):
                read(opened.fileno(), 0, 32)
                for page in reversed(range(64, PAGES)):
                    check(copy[page * PAGE_SIZE : (page + 1) * PAGE_SIZE], page * PAGE_SIZE)
                    if page == 4032:  # it has come into the piece from 2048 to 4095
                        policy.idle()
                        assert resident(file, 2048, 2048) == 2048
            policy.idle()
            assert resident(file) == PAGES
            asked = (policy.count("prefetch_bytes") - before) // PAGE_SIZE
            # The first window was forgotten with the jump.
            assert 0.7 * PAGES < asked <= 1.02 * PAGES + 4 * MIB, asked
            replay = policy.replay()
            assert replay.jumps <= 1 and not replay.dropped
            assert replay.accuracy is not None and replay.accuracy > 0.8

    def test_ranks_share_one_prefetch(self, file: Path) -> None:
        """Two processes with the halves of each piece, and common pieces: every page comes once."""
        piece = 256
        halves: list[list[Range]] = [[], []]
        for number, start in enumerate(range(0, PAGES, piece)):
            pages = min(piece, PAGES - start)
            for rank in range(2):
                if number % 4 == 3:  # both want all of it
                    halves[rank].append((0, start, pages))
                    continue
                cut = pages // 2
                part = (start, cut) if rank == 0 else (start + cut, pages - cut)
                halves[rank].append((0, *part))
        with self.engine.attach(template_of([file], *halves), [file], window_mib=4) as policy:
            drop([file])
            before = policy.count("added_bytes")
            children = []
            for rank in range(2):
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        fd = os.open(file, os.O_RDONLY)
                        for _, start, pages in halves[rank]:
                            read(fd, start, pages)
                        code = 0
                    finally:
                        os._exit(code)
                children.append(pid)
            assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
            policy.idle()
            assert resident(file) == PAGES
            assert policy.count("added_bytes") - before <= 1.03 * PAGES * PAGE_SIZE
            asked = policy.count("prefetch_bytes")
            assert 0.5 * PAGES * PAGE_SIZE < asked <= 1.05 * PAGES * PAGE_SIZE, asked / PAGE_SIZE
            replay = policy.replay()
            assert replay.accuracy is not None and replay.accuracy > 0.9
            positions = [consumer.position for consumer in replay.consumers]
            assert all(
                at > 0.9 * c.length for at, c in zip(positions, replay.consumers, strict=True)
            )

    def test_a_wrong_template_is_dropped(self, file: Path) -> None:
        """A template whose order is wrong is given up, and streams are found as sequential does."""
        order = backwards(piece=16)
        with self.engine.attach(template_of([file], order), [file], window_mib=1) as policy:
            drop([file])
            fd = os.open(file, os.O_RDONLY)
            # Nothing of it is true: strides that always land outside of what was asked for.
            places = [(number * 1811) % (PAGES - 1) for number in range(400)]
            reads = 0
            for page in places:
                if policy.replay().dropped:
                    break
                read(fd, page, 1)
                reads += 1
                policy.idle()
            replay = policy.replay()
            assert replay.dropped and replay.accuracy is not None and replay.accuracy < 0.5
            # A process that begins in the middle has not followed what lies before it.
            assert replay.followed <= reads * (1 + self.engine.beyond) * PAGE_SIZE
            drop([file])
            asked = policy.count("prefetch_bytes")
            for page in range(0, 2048, 32):
                read(fd, page, 32)
            policy.idle()
            os.close(fd)
            assert policy.count("prefetch_bytes") - asked > 1024 * PAGE_SIZE

    def test_drop_behind(self, file: Path) -> None:
        """With drop_behind=1 little but the window is left of what was read."""
        order = backwards(piece=512)
        with self.engine.attach(
            template_of([file], order), [file], window_mib=4, drop_behind=1
        ) as policy:
            drop([file])
            fd = os.open(file, os.O_RDONLY)
            for _, start, pages in order:
                read(fd, start, pages)
            os.close(fd)
            policy.idle()
            # the last piece, a page of each, and what the kernel reads behind the end of each
            left = 512 + (2 + self.engine.beyond) * len(order) + SLACK
            wait_for(lambda: resident(file) <= left, "the pages to go")
            most = PAGES + self.engine.beyond * len(order)
            assert policy.count("added_bytes") <= 1.05 * most * PAGE_SIZE

    def test_what_a_broken_off_load_has_passed_does_not_count(self, file: Path) -> None:
        """An extent goes when both ranks of one load have read it, not one rank of each of two."""
        shared = [(0, start, 512) for start in range(4096, 7168, 512)]
        ranks = [[(0, start, 512), *shared, (0, start + 512, 512)] for start in (0, 2048)]
        with self.engine.attach(
            template_of([file], *ranks), [file], window_mib=4, drop_behind=1
        ) as policy:
            drop([file])
            _in_a_process(file, ranks[0])
            drop([file])
            with file.open("rb") as reader:
                first, *rest = ranks[0]
                read(reader.fileno(), *first[1:])
                _in_a_process(file, ranks[1])
                policy.idle()
                assert resident(file, 4096, 3072) == 3072
                for _, start, pages in rest:
                    read(reader.fileno(), start, pages)
            policy.idle()
            left = (2 + self.engine.beyond) * len(shared) + SLACK
            wait_for(lambda: resident(file, 4096, 3072) <= left, "the pages to go")

    def test_a_second_load(self, file: Path) -> None:
        """A second load after the pages have gone is read ahead like the first."""
        order = backwards()
        with self.engine.attach(template_of([file], order), [file], window_mib=8) as policy:
            asked = []
            for _ in range(3):
                drop([file])
                before = policy.count("prefetch_bytes")
                fd = os.open(file, os.O_RDONLY)
                for _, start, pages in order:
                    read(fd, start, pages)
                os.close(fd)
                policy.idle()
                asked.append(policy.count("prefetch_bytes") - before)
            assert min(asked) > 0.8 * PAGES * PAGE_SIZE, asked

    def test_without_a_template(self, file: Path) -> None:
        """Without a template it does what sequential does."""
        with self.engine.attach(None, [file]) as policy:
            drop([file])
            fd = os.open(file, os.O_RDONLY)
            read(fd, 0, PAGES)
            os.close(fd)
            policy.idle()
            assert policy.count("prefetch_bytes") > 0.5 * PAGES * PAGE_SIZE

    def test_two_files_in_turns(self, place: Path) -> None:
        """Two shards in turns: each is read ahead as far as it is in the window."""
        files = [make_file(place / f"shard-{number}", 1024) for number in range(2)]
        pages = min(path.stat().st_size for path in files) // PAGE_SIZE
        order = [(n % 2, start, 128) for start in range(0, pages - 128, 128) for n in range(2)]
        with self.engine.attach(template_of(files, order), files, window_mib=2) as policy:
            drop(files)
            fds = [os.open(path, os.O_RDONLY) for path in files]
            read(fds[0], 0, 32)
            policy.idle()
            assert resident(files[0], 0, 256) == 256
            if self.engine.across:
                assert resident(files[1], 0, 128) == 128
            for file, start, many in order:
                read(fds[file], start, many)
            for fd in fds:
                os.close(fd)
            policy.idle()
            replay = policy.replay()
            assert replay.accuracy == 1.0 and replay.jumps == 0
