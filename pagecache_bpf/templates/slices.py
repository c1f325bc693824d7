# SPDX-License-Identifier: Apache-2.0
"""Shares of a dimension of a tensor, and the bytes that they are.

Arithmetic only: nothing here knows a model, a name or a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_PADDING = 64


class Piece(NamedTuple):
    """Ranges of equal length at equal distances: a slice of every row of a matrix, or one range.

    Attributes:
        offset: where the first one begins, in bytes from the start of the tensor.
        length: bytes of each.
        wanted: bytes of all of them that are used; the rest lies between and is not worth a seek.
        rows: how many there are.
        stride: bytes from the beginning of one to that of the next; 0 for a single one.
    """

    offset: int
    length: int
    wanted: int
    rows: int = 1
    stride: int = 0


Shape = tuple[int, ...]
Ranges = list[tuple[int, int]]  # of indices of one dimension: begin, end


def even(size: int, among: int, rank: int) -> Ranges | None:
    """Compute an even share of a dimension.

    Args:
        size: elements of the dimension.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices; None where the dimension does not divide.
    """
    share, rest = divmod(size, among)
    return None if rest else [(rank * share, (rank + 1) * share)]


def rounded_up(size: int, among: int, rank: int) -> Ranges:
    """Compute a share that is rounded up, so that the last ranks have less or nothing.

    Args:
        size: elements of the dimension.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices; [] for nothing.
    """
    share = -(-size // among)
    begin, end = min(size, rank * share), min(size, (rank + 1) * share)
    return [(begin, end)] if end > begin else []


def vocabulary(size: int, among: int, rank: int) -> Ranges | None:
    """Compute a share of a vocabulary that is padded to a multiple of 64.

    Args:
        size: elements of the dimension, without padding.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices, [] where all of its share is padding; None where it does not divide.

    Source: vLLM, vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE.
    """
    padded = -(-size // _PADDING) * _PADDING
    share = even(padded, among, rank)
    if share is None:
        return None
    (begin, end), *_ = share
    begin, end = min(begin, size), min(end, size)
    return [(begin, end)] if end > begin else []


def halves(size: int, among: int, rank: int) -> Ranges | None:
    """Compute an even share of each of two matrices that lie one behind the other.

    Args:
        size: elements of the dimension, of both together.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices in both; None where they do not divide.
    """
    if size % (2 * among):
        return None
    share = size // 2 // among
    return [(half + rank * share, half + (rank + 1) * share) for half in (0, size // 2)]


def by_heads(size: int, heads: int, among: int, rank: int) -> Ranges | None:
    """Compute a share of heads; where there are fewer heads than ranks, several have the same.

    Args:
        size: elements of the dimension.
        heads: heads that it consists of.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices; None where they do not divide.
    """
    if size % heads:
        return None
    if heads >= among:
        return even(size, among, rank) if heads % among == 0 else None
    if among % heads:
        return None
    rows, head = size // heads, rank * heads // among
    return [(head * rows, (head + 1) * rows)]


def concatenated(size: int, heads: int, key_value: int, among: int, rank: int) -> Ranges | None:
    """Compute a share of queries, keys and values that lie one after the other.

    Args:
        size: elements of the dimension.
        heads: heads of queries.
        key_value: heads of keys, and as many of values.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices; None where they do not divide.
    """
    unit = size // (heads + 2 * key_value)
    queries = even(heads, among, rank)
    values = by_heads(key_value, key_value, among, rank)
    if queries is None or values is None:
        return None
    found = [(begin * unit, end * unit) for begin, end in queries]
    for base in (heads, heads + key_value):
        found += [((base + begin) * unit, (base + end) * unit) for begin, end in values]
    return joined(found)


def grouped(size: int, heads: int, key_value: int, among: int, rank: int) -> Ranges | None:
    """Compute a share of groups, each of the queries of a head of keys, that head and its values.

    Args:
        size: elements of the dimension.
        heads: heads of queries.
        key_value: heads of keys, and as many of values.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices; None where they do not divide.
    """
    if heads % key_value or heads % among:
        return None
    unit = size // (heads + 2 * key_value)
    per_group = heads // key_value
    if key_value >= among:
        return even(size, among, rank) if key_value % among == 0 else None
    if among % key_value:
        return None
    group, place = divmod(rank, among // key_value)
    begin = group * (per_group + 2)
    share = heads // among
    queries = begin + place * share
    return joined(
        [
            (queries * unit, (queries + share) * unit),
            ((begin + per_group) * unit, (begin + per_group + 2) * unit),
        ]
    )


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sort ranges and join those that touch or overlap.

    Args:
        ranges: begin and end of each.

    Returns:
        Disjoint ranges in order.
    """
    found: Ranges = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def split(
    shape: Shape, length: int, dimension: int, ranges: Sequence[tuple[int, int]], gap: int
) -> list[Piece]:
    """Compute the bytes of ranges of one dimension of a tensor.

    Args:
        shape: the tensor's dimensions, the slowest first.
        length: its bytes.
        dimension: which of them is cut.
        ranges: indices of it, disjoint and in order.
        gap: bytes between two pieces that are read along.

    Returns:
        The pieces; [] where an element is no whole number of bytes.
    """
    count = math.prod(shape[:dimension])
    unit, rest = divmod(length, count * shape[dimension])
    if rest or not unit:
        return []
    stride = unit * shape[dimension]
    used = sum(end - begin for begin, end in ranges) * unit
    spans = [(begin * unit, end * unit) for begin, end in ranges]
    between = [after - before for (_, before), (after, _) in itertools.pairwise(spans)]
    around = stride - spans[-1][1] + spans[0][0]
    if count == 1:
        return [Piece(begin, end - begin, end - begin) for begin, end in spans]
    if used == stride:
        return [Piece(0, length, length)]
    if max([around, *between]) <= gap:
        covered = (count - 1) * stride + spans[-1][1] - spans[0][0]
        return [Piece(spans[0][0], covered, count * used)]
    return [Piece(begin, end - begin, count * (end - begin), count, stride) for begin, end in spans]
