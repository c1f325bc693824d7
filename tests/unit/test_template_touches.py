# SPDX-License-Identifier: Apache-2.0
"""First bytes of tensors among what a rank reads: all of them, in few extents, in the order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagecache_bpf.templates.template import STRIDED, expanded
from pagecache_bpf.templates.touches import with_touches

#: Of each tensor: bytes of the one before it that nobody names, its own, and how it is read.
TENSORS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([8, 8, 8, 16, 24]),
        st.sampled_from(["not", "not", "whole", "end", "untouched"]),
    ),
    min_size=1,
    max_size=40,
)


@given(TENSORS, st.randoms(use_true_random=False), st.integers(1, 3))
def test_every_first_byte_is_there_in_the_order_of_reading(
    tensors: list[tuple[int, int, str]], random: object, many: int
) -> None:
    ends = [0] * many
    laid: list[tuple[int, int, int, str]] = []
    for number, (hole, size, how) in enumerate(tensors):
        file = number * many // len(tensors)
        laid.append((file, ends[file] + hole, size, how))
        ends[file] += hole + size
    for file in range(many):
        part = [entry for entry in laid if entry[0] == file]
        random.shuffle(part)  # type: ignore[attr-defined]
        laid = [entry for entry in laid if entry[0] != file] + part
    rows, places, wanted = [], [], []
    for place, (file, offset, size, how) in enumerate(laid):
        if how != "untouched" and how != "whole":
            wanted.append((file, offset))
        if how in ("whole", "end"):
            begin = 0 if how == "whole" else size // 2
            rows.append((7, file, offset + begin, size - begin, size - begin, 1, 0))
            places.append(place)
    files = np.array([-1 if how == "untouched" else file for file, _, _, how in laid])
    found = with_touches(
        np.array(rows, STRIDED),
        np.array(places, np.int64),
        files,
        np.array([offset for _, offset, _, _ in laid]),
        np.array([size for _, _, size, _ in laid]),
        7,
    )
    single = expanded(found)
    assert (single["consumer"] == 7).all()
    touches = single[single["length"] == 1]
    assert sorted(zip(touches["file"].tolist(), touches["offset"].tolist(), strict=True)) == sorted(
        wanted
    )
    assert single[single["length"] > 1].tolist() == expanded(np.array(rows, STRIDED)).tolist()
    # Between two tensors of which more is read come exactly those that lie between them.
    order = {(file, offset): place for place, (file, offset, _, _) in enumerate(laid)}
    bounds = [-1, *places, len(laid)]
    at = 0
    for row in single.tolist():
        if row[3] > 1:
            at += 1
            continue
        place = order[row[1], row[2]]
        assert bounds[at] < place <= bounds[at + 1]


def test_what_is_alike_is_one_extent() -> None:
    """The 16,384 tensors of a layer of 256 experts that other ranks have."""
    size, scales, count = 1 << 20, 256, 1 << 13
    lengths = np.array([size, scales] * count)
    offsets = np.cumsum(lengths) - lengths + 4096
    none = np.zeros(0, np.int64)
    found = with_touches(np.zeros(0, STRIDED), none, np.zeros_like(lengths), offsets, lengths, 0)
    assert found.tolist() == [
        (0, 0, 4096 + size, 1, count, count, size + scales),
        (0, 0, 4096, 1, count, count, size + scales),
    ]


def test_the_header_comes_first() -> None:
    header = np.array([(0, 0, 0, 100, 100, 1, 0)], STRIDED)
    files, offsets, lengths = np.zeros(2, np.int64), np.array([100, 300]), np.array([200, 50])
    found = with_touches(header, np.array([-1]), files, offsets, lengths, 0)
    assert found["offset"].tolist() == [0, 300, 100]
