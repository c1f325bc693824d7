# SPDX-License-Identifier: Apache-2.0
"""The parts of the kernel module that know pages and bounds only, compiled for user space.

Each is compared with a model in Python (a set, a list) over long random sequences, or with what
the comments in pagecacheabi.h promise.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.kernel import abi

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "kmod"
NO_MARK = abi.NO_MARK
READ, DROP = 0, 1
CHUNK = 512
U64 = ctypes.c_uint64


class Extent(ctypes.Structure):
    """`struct pcb_extent`."""

    _fields_ = (
        ("start", ctypes.c_ulong),
        ("end", ctypes.c_ulong),
        ("mark", ctypes.c_ulong),
        ("mark_step", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("op", ctypes.c_int),
        ("demand", ctypes.c_bool),
        ("dropbehind", ctypes.c_bool),
    )


class Plan(ctypes.Structure):
    """`struct pcb_plan`."""

    _fields_ = (
        ("start", ctypes.c_ulong),
        ("nr", ctypes.c_ulong),
        ("mark", ctypes.c_ulong),
        ("order", ctypes.c_uint32),
        ("node", ctypes.c_int32),
        ("dropbehind", ctypes.c_bool),
    )


class Bounds(ctypes.Structure):
    """`struct pcb_plan_bounds`."""

    _fields_ = (
        ("file_pages", U64),
        ("max_pages", U64),
        ("max_order", ctypes.c_uint32),
        ("node_allowed", ctypes.c_bool),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The harness, with the compiler's checks of undefined behavior ending the process."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("kmod") / "pure.so"
    flags = ["-O1", "-g", "-Wall", "-Werror", "-fPIC", "-shared"]
    checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    include = ["-I", str(HERE), "-I", str(ROOT / "bpf" / "include")]
    source = str(HERE / "harness.c")
    subprocess.run(
        [compiler, *flags, *checks, *include, source, "-o", str(out)], check=True, timeout=120
    )
    loaded = ctypes.CDLL(str(out))
    loaded.keep_new.restype = loaded.queue_new.restype = ctypes.c_void_p
    loaded.keep_has.restype = loaded.keep_add.restype = ctypes.c_bool
    loaded.keep_clear.restype = loaded.pcb_queue_clear.restype = U64
    loaded.keep_total.restype = ctypes.c_int64
    loaded.pcb_queue_push.restype = loaded.pcb_queue_push_front.restype = ctypes.c_bool
    loaded.pcb_queue_pop.restype = Extent
    return loaded


class Maps:
    """The keep maps of two files of one policy."""

    def __init__(self, library: ctypes.CDLL, pages: int) -> None:
        self.library = library
        self.pointer = ctypes.c_void_p(library.keep_new(ctypes.c_ulong(pages)))

    def has(self, file: int, index: int) -> bool:
        return bool(self.library.keep_has(self.pointer, file, ctypes.c_ulong(index)))

    def add(self, file: int, index: int, pages: int, bound: int) -> bool:
        arguments = (ctypes.c_ulong(index), ctypes.c_ulong(pages), U64(bound))
        return bool(self.library.keep_add(self.pointer, file, *arguments))

    def remove(self, file: int, index: int, pages: int) -> None:
        self.library.keep_del(self.pointer, file, ctypes.c_ulong(index), ctypes.c_ulong(pages))

    def clear(self, file: int) -> int:
        return int(self.library.keep_clear(self.pointer, file))

    @property
    def total(self) -> int:
        return int(self.library.keep_total(self.pointer))


@pytest.fixture
def maps(library: ctypes.CDLL) -> Iterator[Maps]:
    it = Maps(library, 1000)
    yield it
    library.keep_free(it.pointer)


def test_a_keep_map_is_a_set(maps: Maps) -> None:
    """Random keeps and removals of folios in two files, against two Python sets."""
    chance = random.Random(16)
    kept: tuple[set[int], set[int]] = (set(), set())
    bound = 700
    for _ in range(20_000):
        file, index, pages = chance.randrange(2), chance.randrange(1100), 1 << chance.randrange(7)
        folio = set(range(index, index + pages))
        if chance.random() < 0.6:
            fits = index + pages <= 1000
            room = len(kept[0]) + len(kept[1])
            expected = fits and room + len(folio - kept[file]) <= bound
            assert maps.add(file, index, pages, bound) == expected
            if expected:
                kept[file].update(folio)
        else:
            maps.remove(file, index, pages)
            kept[file].difference_update(folio)
        assert maps.total == len(kept[0]) + len(kept[1])
    for file in range(2):
        assert {index for index in range(1200) if maps.has(file, index)} == kept[file]
    assert maps.clear(0) == len(kept[0])
    assert maps.total == len(kept[1])


def test_a_bound_that_has_fallen_refuses_new_pages_only(maps: Maps) -> None:
    assert maps.add(0, 0, 8, 8)
    assert not maps.add(0, 8, 1, 8)
    assert not maps.add(0, 0, 8, 4)  # kept before, and more than is allowed now
    maps.remove(0, 0, 8)
    assert maps.add(0, 0, 4, 4)
    assert maps.total == 4


def test_pages_far_behind_the_map(maps: Maps) -> None:
    """A file that has grown since it was tagged, up to the largest index there is."""
    top = (1 << 64) - 1
    for index in (1000, 1001, top - 1, top):
        assert not maps.add(0, index, 1, 1000)
        maps.remove(0, index, 1)
        assert not maps.has(0, index)
    assert not maps.add(0, 999, 2, 1000)
    assert maps.add(0, 999, 1, 1000)
    maps.remove(0, 999, 512)
    assert maps.total == 0


class Queue:
    """A queue of extents."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.pointer = ctypes.c_void_p(library.queue_new())

    def push(self, extent: Extent, front: bool = False) -> bool:
        push = self.library.pcb_queue_push_front if front else self.library.pcb_queue_push
        return bool(push(self.pointer, ctypes.byref(extent)))

    def pop(self, read_pages: int = CHUNK, drop_pages: int = CHUNK) -> Extent:
        found = self.library.pcb_queue_pop(
            self.pointer, ctypes.c_ulong(read_pages), ctypes.c_ulong(drop_pages)
        )
        assert isinstance(found, Extent)
        return found

    def clear(self) -> int:
        return int(self.library.pcb_queue_clear(self.pointer))

    @property
    def count(self) -> int:
        return int(self.library.queue_count(self.pointer))

    def drain(self) -> Iterator[Extent]:
        while self.count:
            yield self.pop()


@pytest.fixture
def queue(library: ctypes.CDLL) -> Queue:
    return Queue(library)


def extent(start: int, end: int, mark: int = NO_MARK, step: int = 0, op: int = READ) -> Extent:
    return Extent(start, end, mark, step, abi.ORDER_AUTO, op, False)


@pytest.mark.parametrize("op", [READ, DROP])
def test_pieces_never_split_an_aligned_folio(queue: Queue, op: int) -> None:
    """Whatever an extent's start: each folio that lies wholly in it lies wholly in a piece."""
    chance = random.Random(7)
    for _ in range(300):
        start = chance.randrange(1 << 40)
        end = start + chance.randrange(1, 20_000)
        assert queue.push(extent(start, end, op=op))
        pieces = [(piece.start, piece.end) for piece in queue.drain()]
        assert pieces[0][0] == start and pieces[-1][1] == end
        assert all(left[1] == right[0] for left, right in itertools.pairwise(pieces))
        assert all(0 < piece_end - piece_start <= CHUNK for piece_start, piece_end in pieces)
        for folio in (16, 64, 512):
            first = -(-start // folio) * folio
            for index in range(first, end - folio + 1, folio):
                assert any(left <= index and index + folio <= right for left, right in pieces)


def test_drops_are_cut_at_multiples_of_their_own(queue: Queue) -> None:
    queue.push(extent(100, 5000, op=DROP))
    assert (queue.pop(512, 2048).end, queue.pop(512, 2048).end) == (2048, 4096)


def test_markers_fall_on_the_first_page_of_a_piece(queue: Queue) -> None:
    """All of them, in any number of extents that are pushed one behind the other."""
    for start, end in ((100, 3000), (3000, 3100), (3100, 9000)):
        assert queue.push(extent(start, end, mark=start, step=700))
    marks = []
    for piece in queue.drain():
        assert piece.mark in (NO_MARK, piece.start)
        if piece.mark == piece.start:
            marks.append(piece.start)
    assert marks[:5] == [100, 800, 1500, 2200, 2900]
    assert 3000 in marks and 3100 in marks


def test_neighbors_become_one_extent(queue: Queue) -> None:
    assert queue.push(extent(0, 100)) and queue.push(extent(100, 200))
    assert queue.count == 1
    assert queue.push(extent(200, 300, op=DROP)) and queue.push(extent(301, 400, op=DROP))
    assert queue.count == 3


def test_a_marker_survives_a_neighbor_without_a_rhythm(queue: Queue) -> None:
    """An answer for another node has one marker and no step; it is not lost in a longer extent."""
    assert queue.push(extent(0, 100)) and queue.push(extent(100, 200, mark=150))
    marks = [piece.mark for piece in queue.drain() if piece.mark != NO_MARK]
    assert marks == [150]


def test_demand_goes_first(queue: Queue) -> None:
    for number in range(10):
        assert queue.push(extent(number * 10_000, number * 10_000 + 1000))
    wanted = extent(500_000, 500_700)
    wanted.demand = True
    assert queue.push(wanted, front=True)
    first, second = queue.pop(), queue.pop()
    assert (first.start, second.end, second.demand) == (500_000, 500_700, True)
    assert queue.pop().start == 0


def test_a_full_queue_refuses(queue: Queue) -> None:
    taken = 0
    while queue.push(extent(taken * 10, taken * 10 + 1), front=bool(taken % 2)):
        taken += 1
    assert taken == queue.count == 64
    assert not queue.push(extent(5, 6), front=True)
    assert queue.clear() == 64 and queue.count == 0


def test_a_queue_keeps_every_page(queue: Queue) -> None:
    """Random pushes and pops around the ring: each page once, those that came first at first."""
    chance = random.Random(3)
    expected: list[int] = []
    popped: list[int] = []
    page = 0
    for _ in range(3000):
        if chance.random() < 0.5:
            start = page + chance.randrange(3)
            page = start + chance.randrange(1, 60)
            if queue.push(extent(start, page)):
                expected += range(start, page)
        elif queue.count:
            piece = queue.pop(32, 32)
            popped += range(piece.start, piece.end)
    for piece in queue.drain():
        popped += range(piece.start, piece.end)
    assert popped == expected


def plan(library: ctypes.CDLL, answer: abi.pagecache_answer, **bounds: int) -> tuple[int, Plan]:
    limits = {"file_pages": 1000, "max_pages": 512, "max_order": 9, "node_allowed": 1} | bounds
    out = Plan()
    result = library.pcb_plan_from(
        ctypes.byref(answer), ctypes.byref(Bounds(**limits)), ctypes.byref(out)
    )
    return int(result), out


def answer(start: int, pages: int, **more: int) -> abi.pagecache_answer:
    preset = {"mark": NO_MARK, "node": -1, "order": abi.ORDER_AUTO} | more
    return abi.pagecache_answer(start=start, nr=pages, **preset)


AS_ANSWERED, CLAMPED, INVALID = range(3)


@pytest.mark.parametrize(
    ("given", "result", "start", "pages"),
    [
        (answer(0, 0), AS_ANSWERED, 0, 0),
        (answer(7, 100), AS_ANSWERED, 7, 100),
        (answer(990, 10), AS_ANSWERED, 990, 10),
        (answer(990, 11), CLAMPED, 990, 10),
        (answer(0, 513), CLAMPED, 0, 512),
        (answer(999, (1 << 64) - 1), CLAMPED, 999, 1),
        (answer(1000, 1), INVALID, None, None),
        (answer((1 << 64) - 1, (1 << 64) - 1), INVALID, None, None),
    ],
)
def test_an_answer_is_cut(
    library: ctypes.CDLL,
    given: abi.pagecache_answer,
    result: int,
    start: int | None,
    pages: int | None,
) -> None:
    got, out = plan(library, given)
    assert got == result
    if start is not None:
        assert (out.start, out.nr, out.mark) == (start, pages, NO_MARK)


def test_an_empty_file_has_no_valid_answer(library: ctypes.CDLL) -> None:
    assert plan(library, answer(0, 1), file_pages=0)[0] == INVALID
    assert plan(library, answer(0, 0), file_pages=0)[0] == AS_ANSWERED


def test_marker_order_and_node_are_checked(library: ctypes.CDLL) -> None:
    got, out = plan(library, answer(10, 20, mark=29, order=3, node=1))
    assert (got, out.mark, out.order, out.node) == (AS_ANSWERED, 29, 3, 1)
    for mark in (9, 30, (1 << 64) - 2):
        got, out = plan(library, answer(10, 20, mark=mark))
        assert (got, out.mark) == (CLAMPED, NO_MARK)
    got, out = plan(library, answer(10, 20, order=12))
    assert (got, out.order) == (CLAMPED, 9)
    got, out = plan(library, answer(10, 20, node=1), node_allowed=0)
    assert (got, out.node) == (CLAMPED, -1)
