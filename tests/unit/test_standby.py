# SPDX-License-Identifier: Apache-2.0
"""When a policy leaves a reader to the kernel, when it tries to help, and for how long it goes on.

bpf/include/standby.bpf.h runs here with a clock of its own, so that loads of hundreds of GB at
exact speeds take moments; tests/native/test_bytes_read.py has real readers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.policy.compiler import compile_simulation

MIB, GIB = 1, 1024  # everything here is counted in MiB
PAGES = 256  # of a MiB
DEEP, SHALLOW = 8 * PAGES, PAGES // 8  # the kernel's readahead: 8 MiB, 128 KiB
ALONE, TRYING, HELPING, CHECKING, FIRST = range(5)
LOOK, PROOF, WINDOW = 32, 256, 128
FIRST_MIB = 8
BEGINNING = 32  # at a GiB a second it is over then
INO = 7


@pytest.fixture(scope="module")
def source() -> Path:
    try:
        return compile_simulation(Path(__file__).parent / "bpf" / "standby.bpf.c")
    except UnsupportedError as error:
        pytest.skip(f"nothing is compiled here: {error}")


@pytest.fixture
def code(source: Path, tmp_path: Path) -> Iterator[ctypes.CDLL]:
    """A copy of the code for each test, as its maps are part of it."""
    copy = tmp_path / "standby.so"
    copy.write_bytes(source.read_bytes())
    loaded = ctypes.CDLL(str(copy))
    loaded.is_left_alone.argtypes = (
        *(ctypes.c_uint32,) * 3,
        *(ctypes.c_uint64,) * 10,
    )
    loaded.set_device_speed.argtypes = (ctypes.c_uint64, ctypes.c_uint32)
    loaded.set_node.argtypes = (ctypes.c_uint32, ctypes.c_int32)
    loaded.set_file_pages.argtypes = (ctypes.c_uint64,)
    loaded.models_told.restype = ctypes.c_uint64
    yield loaded


@dataclass
class Reader:
    """A process that reads a file from front to back by 1 MiB, with threads that take turns."""

    code: ctypes.CDLL
    model: int = 1
    process: int = 100
    readahead: int = DEEP
    threads: int = 1
    file_size: int = 0  # MiB, of files that are read in an order of the policy's; 0: one file
    at: int = 0  # MiB
    there: int = 0  # MiB from the front that are in the page cache: what was read ahead, too
    on_its_way: int = 0  # MiB of what was asked for
    now: float = 1.0  # s
    ran: float = 0.5  # s, of its time so far
    left_alone: bool = False
    states: list[tuple[int, int]] = field(default_factory=list)

    def read(self, size: int, speed: float, waits: float = 0.5) -> list[tuple[int, int]]:
        """Read on, and tell which states the reader came into, and where.

        Args:
            size: MiB.
            speed: MiB a second.
            waits: the part of that time in which it waits.
        """
        begun = len(self.states)
        for _ in range(size):
            self.now += 1 / speed
            self.ran += (1 - waits) / speed
            self.at += 1
            state = self.states[-1][1] if self.states else FIRST
            helped = self.readahead < DEEP and state in (HELPING, TRYING)
            self.there = max(self.there, self.at + (WINDOW if helped else 0))
            thread = self.process + self.at % self.threads
            nanoseconds = (int(self.now * 1e9), int(self.ran * 1e9))
            file = INO + (self.at // self.file_size if self.file_size else 0)
            followed = 0 if self.file_size else INO
            where = (self.model, self.process, thread, file, followed, self.at * PAGES, PAGES)
            self.left_alone = bool(
                self.code.is_left_alone(
                    *(*where, *nanoseconds, self.readahead),
                    *(self.there * PAGES, self.on_its_way * PAGES, WINDOW * PAGES),
                )
            )
            state = self.code.state_of(self.model, self.process)
            if not self.states or self.states[-1][1] != state:
                self.states.append((self.at, state))
            assert self.left_alone == (state in (ALONE, CHECKING, FIRST))
        return self.states[begun:]

    def read_until(self, state: int, speed: float, most: int = 20 * GIB) -> int:
        """Read on until the reader is in a state, and return where that is.

        Args:
            state: one of the states.
            speed: MiB a second.
            most: MiB within which it has to happen.
        """
        for _ in range(most):
            if [came for _, came in self.read(1, speed)] == [state]:
                return self.at
        raise AssertionError(f"not within {most} MiB: {self.states}")


def about(at: int) -> object:
    """Where a look ends that begins with an access: some MiB after a multiple of its size."""
    return pytest.approx(at, abs=LOOK + 1)


def test_a_slow_reader_is_helped_after_a_gibibyte_as_long_as_that_is_faster(
    code: ctypes.CDLL,
) -> None:
    code.set_device_speed(INO, 2000)
    reader = Reader(code)
    tried = reader.read_until(TRYING, 1000)
    assert tried == about(GIB)
    assert reader.read_until(HELPING, 1260) - tried == about(2 * LOOK)
    assert reader.read(GIB, 1110) == []
    given_up = reader.read_until(ALONE, 1090)
    assert given_up - tried < 2 * GIB
    assert reader.read_until(TRYING, 1000) - given_up == about(2 * GIB)


def test_each_try_that_does_not_pay_comes_twice_as_late_as_the_one_before(
    code: ctypes.CDLL,
) -> None:
    code.set_device_speed(INO, 2000)
    reader = Reader(code)
    alone, pauses = 0, []
    for _ in range(7):
        pauses.append(reader.read_until(TRYING, 1000) - alone)
        alone = reader.read_until(ALONE, 1240, 3 * LOOK)
    assert pauses == [about(gibibytes * GIB) for gibibytes in (1, 2, 4, 8, 16, 16, 16)]


def test_a_try_that_pays_makes_the_next_one_early_again(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 2000)
    reader = Reader(code)
    for _ in range(3):
        reader.read_until(TRYING, 1000)
        reader.read_until(ALONE, 1000)
    reader.read_until(TRYING, 1000)
    reader.read_until(HELPING, 1500)
    lost = reader.read_until(ALONE, 900, 256 + LOOK)
    assert reader.read_until(TRYING, 1000) - lost == about(2 * GIB)


@pytest.mark.parametrize(
    ("device", "speed", "waits", "tried"),
    [
        pytest.param(2000, 1000, 0.5, True, id="half of the device's speed"),
        pytest.param(2000, 1000, 0.09, False, id="hardly ever waits"),
        pytest.param(2000, 1420, 0.5, False, id="most of the device's speed"),
        pytest.param(2000, 1380, 0.5, True, id="somewhat less of it"),
        pytest.param(0, 1420, 0.5, True, id="a device of unknown speed"),
        pytest.param(0, 1420, 0.09, False, id="the same, hardly ever waits"),
        pytest.param(1000, 1420, 0.5, False, id="a device that was measured as too slow"),
    ],
)
def test_who_gains_nothing_is_never_helped(
    code: ctypes.CDLL, device: int, speed: float, waits: float, tried: bool
) -> None:
    code.set_device_speed(INO, device)
    reader = Reader(code)
    states = [state for _, state in reader.read(2 * GIB, speed, waits)]
    assert (TRYING in states) == tried
    assert ctypes.c_uint64.in_dll(code, "device_percent").value <= 100


def test_what_was_found_counts_for_who_reads_the_model_next(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 2000)
    first = Reader(code)
    first.read_until(TRYING, 1000)
    first.read_until(ALONE, 1000)
    next_one, other_model = Reader(code, process=200), Reader(code, model=2, process=300)
    tried = [reader.read_until(TRYING, 1000) for reader in (next_one, other_model)]
    assert tried == [about(2 * GIB), about(GIB)]


def test_a_shallow_readahead_is_helped_at_once_and_a_deep_one_is_not(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 2400)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(PROOF, 1000)
    assert not reader.left_alone
    reader.readahead = DEEP
    reader.read(1, 1000)
    assert reader.left_alone
    reader.readahead = SHALLOW
    reader.read(BEGINNING, 1000)
    assert not reader.left_alone


@pytest.mark.parametrize(
    ("speed", "device", "after"),
    [(1350, 2600, ALONE), (1250, 2600, HELPING), (700, 900, ALONE), (1900, 0, None)],
    ids=["above half of the device's", "below it", "a slower device", "a device nobody knows"],
)
def test_who_comes_near_to_the_device_at_once_is_not_helped(
    code: ctypes.CDLL, speed: float, device: int, after: int | None
) -> None:
    code.set_device_speed(INO, device)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(8, speed / 2)  # the kernel's readahead grows
    reader.read(200, speed)
    if after is None:
        assert [state for _, state in reader.states] == [HELPING]
        return
    begun, judged = reader.states
    assert (begun, judged[1]) == ((1, FIRST), after)
    assert judged[0] <= 2 * FIRST_MIB + 1
    if after == ALONE:
        # What the device can do may have been measured in a bad moment: it is tried all the same.
        assert reader.read_until(TRYING, speed) == about(GIB)
        reader.read_until(ALONE, speed, 3 * LOOK)
        assert reader.read_until(TRYING, speed) == about(3 * GIB + 2 * LOOK)
        reader.read_until(HELPING, 1.3 * speed, 3 * LOOK)


def test_the_beginning_is_over_in_a_moment_however_slow_or_short(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 60)
    slow = Reader(code, readahead=SHALLOW)
    slow.read(3, 20)
    assert [state for _, state in slow.states] == [FIRST, HELPING]
    # Files of 2 MiB at 2500 MiB a second: a look never comes to its end.
    alone = []
    for at in range(200):
        file, page = INO + at // 2, at % 2 * PAGES
        code.set_device_speed(file, 2600)
        now = 10**9 + at * 400_000
        alone.append(
            code.is_left_alone(
                *(2, 200, 200, file, file, page, PAGES, now, now // 2, SHALLOW, at * PAGES, 0),
                WINDOW * PAGES,
            )
        )
    assert code.state_of(2, 200) == HELPING
    assert alone == [1] * 125 + [0] * 75


def test_what_was_cached_at_the_beginning_does_not_count(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 2600)
    reader = Reader(code, readahead=SHALLOW, there=4 * FIRST_MIB)
    reader.read(3 * FIRST_MIB, 2500)
    assert [state for _, state in reader.states] == [FIRST, HELPING]


def test_who_is_known_to_load_is_helped_from_the_first_access(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 2600)
    code.set_node(100, 1)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(1, 2500)
    assert [state for _, state in reader.states] == [HELPING]


def checked(reader: Reader, helped: float, alone: float) -> int:
    """Have a reader helped until it is left alone for a moment; return where that has begun."""
    begun = reader.read_until(CHECKING, helped)
    while reader.states[-1][1] == CHECKING:
        # What was read ahead before is there as quickly as ever.
        reader.read(1, helped if reader.at < reader.there else alone)
    assert reader.at - begun <= WINDOW + 4 * LOOK + 1
    return begun


def test_a_reader_that_is_as_fast_without_help_is_left_alone_and_so_is_the_next(
    code: ctypes.CDLL,
) -> None:
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    assert checked(reader, 1000, 1010) == about(PROOF + 2 * LOOK)
    assert reader.left_alone and reader.states[-1][1] == ALONE
    # It waits for half of its time: in two gibibytes the policy tries, for two looks.
    tried = reader.read_until(TRYING, 1000, 2 * GIB + LOOK)
    reader.read_until(ALONE, 1000, 3 * LOOK)
    later = Reader(code, process=200, readahead=SHALLOW)
    later.read(1, 1000)
    assert later.left_alone
    # And is back for everybody where that pays.
    later.read_until(TRYING, 1000, 4 * GIB + LOOK)
    later.read_until(HELPING, 1300, 3 * LOOK)
    last, other = Reader(code, process=300, readahead=SHALLOW), Reader(code, 2, 400, SHALLOW)
    for begun in (last, other):
        begun.read(BEGINNING, 1000)
        assert not begun.left_alone
    assert tried > GIB


def test_what_was_found_of_a_reader_counts_for_those_that_read_alike(code: ctypes.CDLL) -> None:
    """One that reads twice as fast was as fast alone: that says nothing of a slower one."""
    code.set_device_speed(INO, 4400)
    reader = Reader(code, readahead=SHALLOW)
    checked(reader, 2000, 2010)
    assert reader.states[-1][1] == ALONE
    other = Reader(code, process=200, readahead=SHALLOW)
    other.read(BEGINNING, 1000)
    assert [state for _, state in other.states] == [FIRST, HELPING]
    alike = Reader(code, process=300, readahead=SHALLOW)
    alike.read(BEGINNING, 1700)
    assert [state for _, state in alike.states] == [FIRST, ALONE]
    # Where the device's speed is not known a reader is looked at, too, once one gained nothing.
    code.set_device_speed(INO, 0)
    again = Reader(code, process=400, readahead=SHALLOW)
    again.read(BEGINNING, 2000)
    assert [state for _, state in again.states] == [FIRST, ALONE]


@pytest.mark.parametrize("alone", [990, 500])
def test_a_reader_that_is_slower_without_help_is_helped_on_and_asked_less_often(
    code: ctypes.CDLL, alone: float
) -> None:
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    asked = []
    for _ in range(4):
        asked.append(checked(reader, 1000, alone))
        assert not reader.left_alone
    gaps = [after - before for before, after in pairwise(asked)]
    ahead = WINDOW + 2 * LOOK  # of each moment alone, what is passed in it
    assert gaps == [about(gibibytes * GIB + ahead) for gibibytes in (2, 16, 16)]


def test_a_moment_alone_is_over_where_it_is_much_slower(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    reader.read_until(CHECKING, 1000)
    reader.read(reader.there - reader.at, 1000)
    passed = reader.at
    reader.read_until(HELPING, 5, LOOK)
    assert reader.at - passed <= 2  # MiB, at 0.2 s each


def test_what_comes_near_to_the_device_is_not_left_alone(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 1100)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(BEGINNING, 500)
    reader.read(4 * GIB, 1000)
    assert [state for _, state in reader.states] == [FIRST, HELPING]


def test_neither_a_pause_nor_what_was_cached_makes_a_reader_seem_slow_or_fast(
    code: ctypes.CDLL,
) -> None:
    """It is helped at 1000 MiB a second, has 800 alone, and is never left alone for long."""
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(4 * LOOK, 1000)
    reader.now += 3  # the engine does something else
    checked(reader, 1000, 800)
    assert not reader.left_alone
    # Cached: in the moment alone nothing new comes into the cache.
    reader.read_until(CHECKING, 1000)
    reader.there = reader.at + 2 * GIB
    reader.read(WINDOW + 4 * LOOK + 1, 9000, 0)
    assert reader.states[-1][1] == HELPING


def test_a_window_that_grows_first_does_not_count_as_slow_help(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(2 * LOOK, 350)
    checked(reader, 1000, 900)
    assert not reader.left_alone


def test_a_reader_is_not_alone_while_something_is_on_its_way(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    reader.read_until(CHECKING, 1000)
    reader.on_its_way = WINDOW
    for _ in range(WINDOW):
        reader.there = reader.at + 1 + WINDOW // 2
        reader.read(1, 1000)
    assert reader.states[-1][1] == CHECKING
    reader.on_its_way = 0
    reader.there = reader.at
    reader.read(4 * LOOK, 900)
    assert reader.states[-1][1] == HELPING


def test_another_readahead_is_looked_at_anew(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    checked(reader, 1000, 1100)
    later = Reader(code, process=200, readahead=SHALLOW)
    later.read(1, 1000)
    assert later.left_alone
    # The device's setting is another now.
    reader.readahead = 2 * SHALLOW
    begun = Reader(code, process=300, readahead=2 * SHALLOW)
    begun.read(BEGINNING, 1000)
    assert not begun.left_alone


def test_in_files_shorter_than_a_look_nothing_is_found_out(code: ctypes.CDLL) -> None:
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW, file_size=LOOK // 2)
    reader.read(2 * GIB, 1000)
    assert [state for _, state in reader.states] == [FIRST, HELPING]


def test_threads_that_read_much_at_once_are_a_deep_readahead(code: ctypes.CDLL) -> None:
    two, eight = (
        Reader(code, process=process, threads=threads, readahead=SHALLOW)
        for process, threads in ((100, 2), (200, 8))
    )
    two.read(64, 1000)
    eight.read(64, 1000)
    assert (two.left_alone, eight.left_alone) == (False, True)


@pytest.mark.parametrize(
    ("size", "speed", "node", "is_short"),
    [
        (2, 2000, -1, True),  # a millisecond of a fast disk
        (8, 2000, -1, False),  # four
        (2, 64, -1, False),  # 31 of a slow one
        (2, 0, -1, False),  # nobody knows
        (2, 2000, 1, False),  # its pages are wanted on a node
    ],
)
def test_files_that_are_over_in_an_instant_are_left_to_the_kernel(
    code: ctypes.CDLL, size: int, speed: int, node: int, is_short: bool
) -> None:
    for number in range(2 * BEGINNING):
        code.set_device_speed(INO + number, speed)
    if node >= 0:
        code.set_node(100, node)
    code.set_file_pages(size * PAGES)
    reader = Reader(code, readahead=SHALLOW, file_size=size)
    reader.read(BEGINNING, 40)
    assert (code.models_told(1), code.models_told(0)) == (is_short, is_short)
    assert reader.left_alone == is_short
    code.set_file_pages(64 * PAGES)  # larger ones come after them
    reader.read(BEGINNING, 40)
    assert (code.models_told(1), code.models_told(0)) == (0, 0)
    assert not reader.left_alone


@pytest.mark.parametrize(("beginning", "is_checked"), [(700, False), (900, True)])
def test_who_was_much_slower_in_its_beginning_is_not_left_alone_soon(
    code: ctypes.CDLL, beginning: float, is_checked: bool
) -> None:
    """Its beginning was alone, and says what a moment alone would: but only once."""
    code.set_device_speed(INO, 4000)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(2 * FIRST_MIB + 1, beginning)
    reader.read(PROOF + 4 * LOOK, 1000)
    assert (CHECKING in [state for _, state in reader.states]) == is_checked
    if not is_checked:
        reader.read_until(CHECKING, 1000, 2 * GIB + 2 * LOOK)
        reader.read_until(HELPING, 500)
        at = reader.at
        assert reader.read_until(CHECKING, 1000) - at > 15 * GIB


@pytest.mark.parametrize(("speed", "after"), [(2000, HELPING), (2300, ALONE)])
def test_a_reader_of_a_mapping_is_helped_at_three_quarters_of_the_device(
    code: ctypes.CDLL, speed: float, after: int
) -> None:
    code.set_device_speed(INO, 2600)
    code.set_mapped(1)
    reader = Reader(code, readahead=SHALLOW)
    reader.read(8, speed / 2)
    reader.read(BEGINNING, speed)
    assert reader.states[-1][1] == after
