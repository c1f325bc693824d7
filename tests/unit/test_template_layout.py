# SPDX-License-Identifier: Apache-2.0
"""The arrays that policies get: steps in order, shared extents, an index that finds every page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagecache_bpf.kernel import abi
from pagecache_bpf.templates import EXTENT, Template, TemplateFile
from pagecache_bpf.templates import layout as layouts
from pagecache_bpf.templates.intervals import Intervals
from pagecache_bpf.templates.layout import Identity, Layout, lay_out
from pagecache_bpf.templates.template import STRIDED

PAGE = 4096
PIECE = 2048  # pages
DIGEST = "00" * 32


def template(
    sizes: list[int], rows: list[tuple[int, int, int, int]], consumers: int = 1
) -> Template:
    """Sizes and extents in pages."""
    files = tuple(TemplateFile(f"f{n}", size * PAGE, 0, 0, DIGEST) for n, size in enumerate(sizes))
    table = [(c, f, at * PAGE, length * PAGE, length * PAGE) for c, f, at, length in rows]
    names = tuple(f"rank {n}" for n in range(consumers))
    return Template(files, names, np.array(table, EXTENT), "derived", "test", consumers)


def steps_of(layout: Layout, consumer: int) -> list[tuple[int, int, int]]:
    """File, first page and end of each step."""
    own = layout.arrays["template_consumers"][consumer]
    first = int(own["first_step"])
    steps = layout.arrays["template_steps"][first : first + int(own["nr_steps"])]
    extents = layout.arrays["template_extents"][steps["extent"]]
    return [(int(e["file"]), int(e["start"]), int(e["end"])) for e in extents]


def find(layout: Layout, span: int, page: int) -> int | None:
    """As the policy finds a step."""
    arrays = layout.arrays
    part = arrays["template_spans"][span]
    entries = arrays["template_index"][int(part["first"]) : int(part["first"]) + int(part["nr"])]
    at = int(np.searchsorted(entries["start"], page, side="right")) - 1
    if at < 0:
        return None
    step = int(entries["step"][at])
    extent = arrays["template_extents"][int(arrays["template_steps"]["extent"][step])]
    return step if page < extent["end"] else None


def test_order_neighbors_and_pieces() -> None:
    rows = [(0, 0, 100, 50), (0, 0, 150, 50), (0, 1, 0, 5000), (0, 0, 0, 100)]
    layout = lay_out([("m", template([200, 5000], rows))], page_size=PAGE)
    assert steps_of(layout, 0) == [
        (0, 100, 200),
        *((1, 0, PIECE), (1, PIECE, 2 * PIECE), (1, 2 * PIECE, 5000)),
        (0, 0, 100),
    ]
    steps = layout.arrays["template_steps"]
    assert steps["before"].tolist() == [0, 100, 100 + PIECE, 100 + 2 * PIECE, 5100]
    none = abi.TEMPLATE_NONE
    assert steps["next"].tolist() == [4, 2, 3, none, none]


def test_parts_of_pages_are_whole_pages() -> None:
    files = (TemplateFile("f", 10_000, 0, 0, DIGEST),)
    table = np.array([(0, 0, 4095, 2, 2), (0, 0, 9_999, 1, 1), (0, 0, 0, 1, 1)], EXTENT)
    made = Template(files, ("x",), table, "derived", "test")
    layout = lay_out([("m", made)], page_size=PAGE)
    # Pages that touch are joined, and the last one was part of the first one's.
    assert steps_of(layout, 0) == [(0, 0, 3)]


def test_where_steps_are_too_many_near_ranges_are_joined_and_far_ones_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slices = (0, 0, 0, PAGE, 200 * PAGE, 200, 4 * PAGE)
    first_bytes = (0, 1, 0, 1, 200, 200, 1 << 20)
    files = tuple(TemplateFile(name, 200 << 20, 0, 0, DIGEST) for name in ("a", "b"))
    extents = np.array([slices, first_bytes], STRIDED)
    made = Template(files, ("rank 0",), extents, "derived", "test", 1)
    assert len(steps_of(lay_out([("m", made)], page_size=PAGE), 0)) == 400
    monkeypatch.setattr(layouts, "MAX_STEPS", 10)
    assert steps_of(lay_out([("m", made)], page_size=PAGE), 0) == [(0, 0, 199 * 4 + 1)]


def test_ranks_share_what_they_both_want() -> None:
    rows = [(0, 0, 0, 100), (0, 0, 200, 100), (1, 0, 100, 100), (1, 0, 200, 100)]
    layout = lay_out([("m", template([300], rows, 2))], page_size=PAGE)
    # What touches is joined within a rank, and cut again where the other one's begins.
    extents = layout.arrays["template_extents"]
    assert [(int(e["start"]), int(e["end"]), int(e["users"])) for e in extents] == [
        (0, 100, 1),
        (100, 200, 1),
        (200, 300, 2),
    ]
    assert steps_of(layout, 1) == [(0, 100, 200), (0, 200, 300)]


def test_pages_of_two_extents_are_known() -> None:
    rows = [(0, 0, 20, 10), (0, 0, 0, 10), (0, 0, 9, 5), (0, 1, 0, 10)]
    extents = lay_out([("m", template([30, 10], rows))], page_size=PAGE).arrays["template_extents"]
    # The second and the third are joined; a page is shared only where that cannot be.
    assert extents["edges"].tolist() == [0, 0, 0]
    rows = [(0, 0, 0, 10), (0, 0, 20, 10), (0, 0, 9, 5)]
    extents = lay_out([("m", template([30], rows))], page_size=PAGE).arrays["template_extents"]
    first, last = abi.TEMPLATE_SHARED_FIRST, abi.TEMPLATE_SHARED_LAST
    assert extents["start"].tolist() == [0, 9, 20]
    assert extents["edges"].tolist() == [last, first, 0]


def test_huge_pages_that_are_wanted_whole_are_known() -> None:
    huge = 512
    first, last = abi.TEMPLATE_WHOLE_FIRST, abi.TEMPLATE_WHOLE_LAST

    def edges(size: int, *ranges: tuple[int, int], ranks: int = 1) -> list[int]:
        rows = [
            (number % ranks, 0, start, end - start) for number, (start, end) in enumerate(ranges)
        ]
        layout = lay_out([("m", template([size], rows, ranks))], page_size=PAGE)
        return [int(edge) for edge in layout.arrays["template_extents"]["edges"]]

    # The second comes first: together they want all of the huge page in which they meet.
    assert edges(4 * huge, (700, 1700), (0, 700)) == [first | last, first]
    assert edges(4 * huge, (0, 700), (700, 1700), ranks=2) == [first | last, first]
    # A hole, even of one page, and an end of the file that is in it.
    assert edges(4 * huge, (701, 1700), (0, 700)) == [first, 0]
    assert edges(1700, (700, 1700), (0, 700)) == [first | last, first]
    assert edges(1023, (513, 1023), (0, 513)) == [first, 0]
    # What is shorter does not bring in more than itself.
    assert edges(4 * huge, (100, 300), (0, 100), (300, 1024)) == [0, 0, first | last]


def test_repeats_are_left_out() -> None:
    rows = [(0, 0, 10, 10), (0, 0, 0, 30), (0, 0, 12, 4)]
    layout = lay_out([("m", template([30], rows))], page_size=PAGE)
    assert steps_of(layout, 0) == [(0, 10, 20), (0, 0, 10), (0, 20, 30)]


def test_several_models_and_identities() -> None:
    one = template([100, 50], [(0, 0, 0, 10), (1, 1, 0, 10)], 2)
    other = template([70], [(0, 0, 60, 10), (0, 0, 0, 60)])

    def identity(name: str, file: int) -> Identity | None:
        return None if (name, file) == ("one", 1) else Identity(8, 1, 100 + file, len(name))

    layout = lay_out([("one", one), ("other", other)], identity, PAGE)
    values = {key: abi.pagecache_template_file.from_buffer_copy(v) for key, v in layout.files}
    keys = [abi.pagecache_file_key.from_buffer_copy(key) for key in values]
    assert [(k.ino, k.generation, k.dev_major, k.dev_minor) for k in keys] == [
        (100, 3, 8, 1),
        (100, 5, 8, 1),
    ]
    assert [(v.file, v.model, v.spans) for v in values.values()] == [(0, 0, 0), (2, 1, 4)]
    models = layout.arrays["template_models"]
    assert models["first_consumer"].tolist() == [0, 2]
    assert [raw.tobytes().rstrip(b"\0") for raw in models["name"]] == [b"one", b"other"]
    assert steps_of(layout, 2) == [(2, 60, 70), (2, 0, 60)]
    assert find(layout, 4, 65) == int(layout.arrays["template_consumers"]["first_step"][2])
    assert layout.arrays["template_targets"]["pages"].tolist() == [100, 50, 70]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_page_is_found_where_it_is_first_wanted(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=3))
    rows: list[tuple[int, int, int, int]] = []
    for consumer in range(2):
        for _ in range(data.draw(st.integers(1, 6))):
            file = data.draw(st.integers(0, len(sizes) - 1))
            start = data.draw(st.integers(0, sizes[file] - 1))
            rows.append((consumer, file, start, data.draw(st.integers(1, sizes[file] - start))))
    layout = lay_out([("m", template(sizes, rows, 2))], page_size=PAGE)
    check(layout, sizes, rows)


def check(layout: Layout, sizes: list[int], rows: list[tuple[int, int, int, int]]) -> None:
    for consumer in range(2):
        wanted = {
            (file, page)
            for c, file, start, length in rows
            for page in range(start, start + length)
            if c == consumer
        }
        steps = steps_of(layout, consumer)
        pages = [(file, page) for file, start, end in steps for page in range(start, end)]
        # Neighbors may share the page in which one ends and the other begins.
        assert set(pages) == wanted and len(pages) - len(wanted) <= len(steps)
        assert all(end - start <= PIECE for _, start, end in steps)
        first = int(layout.arrays["template_consumers"]["first_step"][consumer])
        for file in range(len(sizes)):
            for page in {
                0,
                sizes[file] // 2,
                sizes[file] - 1,
                *(s for f, s, _ in steps if f == file),
            }:
                step = find(layout, file * 2 + consumer, page)
                if (file, page) in wanted:
                    assert step is not None
                    f, start, end = steps[step - first]
                    assert f == file and start <= page < end
                else:
                    assert step is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=20))
def test_intervals(parts: list[tuple[int, int]]) -> None:
    intervals, seen = Intervals(), set[int]()
    for start, length in parts:
        new = intervals.add(start, start + length)
        pages = {page for begin, end in new for page in range(begin, end)}
        assert pages == set(range(start, start + length)) - seen
        seen |= pages


def test_layout_is_quick_to_describe(tmp_path: Path) -> None:
    """Element sizes are those that maps with BPF_F_MMAPABLE have: multiples of 8."""
    arrays: dict[str, Any] = lay_out([("m", template([10], [(0, 0, 0, 10)]))]).arrays
    assert all(array.dtype.itemsize % 8 == 0 for array in arrays.values())
