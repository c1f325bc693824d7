# SPDX-License-Identifier: Apache-2.0
"""Compares two templates: in which files, in which bytes and in what order they differ.

It opens no file; whether a template fits files, fit tells.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagecache_bpf.templates.template import Template

Ranges = dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class Difference:
    """What two templates have in common and what not; bytes are counted once each.

    Attributes:
        only_left_files: paths of files that only the first one names.
        only_right_files: paths of files that only the second one names.
        changed: paths of files whose size or digest differs.
        common: bytes that both read.
        only_left: bytes that only the first one reads.
        only_right: bytes that only the second one reads.
        in_order: of the common bytes, those that come in the same order, by the longest such run of
            the first one's extents; None: nothing in common.
        consumers: how many consumers each has.
    """

    only_left_files: tuple[str, ...]
    only_right_files: tuple[str, ...]
    changed: tuple[str, ...]
    common: int
    only_left: int
    only_right: int
    in_order: int | None
    consumers: tuple[int, int]

    @property
    def same(self) -> bool:
        """Whether they read the same bytes of the same files in the same order."""
        return not (
            self.only_left_files
            or self.only_right_files
            or self.changed
            or self.only_left
            or self.only_right
            or self.in_order not in (None, self.common)
            or self.consumers[0] != self.consumers[1]
        )


def compare(left: Template, right: Template) -> Difference:
    """Compare two templates.

    Args:
        left: the first one.
        right: the second one.

    Returns:
        In what they differ.
    """
    ours = {file.path: file for file in left.files}
    theirs = {file.path: file for file in right.files}
    both = ours.keys() & theirs.keys()
    a, b = _ranges(left), _ranges(right)
    common = sum(_overlap(a[path], b[path]) for path in a.keys() & b.keys())
    return Difference(
        tuple(sorted(ours.keys() - theirs.keys())),
        tuple(sorted(theirs.keys() - ours.keys())),
        tuple(sorted(path for path in both if ours[path] != theirs[path])),
        common,
        left.distinct - common,
        right.distinct - common,
        min(common, _in_order(left, right)) if common else None,
        (len(left.consumers), len(right.consumers)),
    )


def _ranges(template: Template) -> Ranges:
    """Return for the path of each file where the ranges that are read start and end."""
    return {
        template.files[file].path: (starts.astype(np.int64), ends.astype(np.int64))
        for file, starts, ends in template.ranges()
    }


def _overlap(
    a: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
    b: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
) -> int:
    """Count the bytes that two lists of disjoint, sorted ranges have in common."""
    edges = np.concatenate((a[0], a[1], b[0], b[1]))
    steps = np.concatenate(
        (np.ones(len(a[0])), -np.ones(len(a[1])), np.ones(len(b[0])), -np.ones(len(b[1])))
    )
    order = np.argsort(edges, kind="stable")
    depth = np.cumsum(steps[order])
    lengths = np.diff(edges[order])
    return int(lengths[depth[:-1] == 2].sum())


def _in_order(left: Template, right: Template) -> int:
    """Count bytes of the left's heaviest run of extents that the right has in that order."""
    places = {file.path: number for number, file in enumerate(right.files)}
    extents = right.plain()
    lookup: dict[int, tuple[Any, Any]] = {}
    for file in np.unique(extents["file"]):
        numbers = np.flatnonzero(extents["file"] == file)
        numbers = numbers[np.argsort(extents["offset"][numbers], kind="stable")]
        lookup[int(file)] = (extents["offset"][numbers].astype(np.int64), numbers)
    # Patience sorting by weight: tails[i] is the least position at which a run of weight
    # weights[i] can end; both grow.
    tails: list[tuple[int, int]] = []
    weights: list[int] = []
    for extent in left.plain():
        there = places.get(left.files[int(extent["file"])].path)
        if there is None or there not in lookup:
            continue
        offsets, numbers = lookup[there]
        at = int(np.searchsorted(offsets, int(extent["offset"]), side="right")) - 1
        if at < 0:
            continue
        position = (int(numbers[at]), int(extent["offset"]) - int(offsets[at]))
        place = bisect_left(tails, position)
        weight = int(extent["length"]) + (weights[place - 1] if place else 0)
        if place < len(tails) and tails[place] == position and weights[place] >= weight:
            continue
        end = place
        while end < len(tails) and weights[end] <= weight:
            end += 1
        tails[place:end] = [position]
        weights[place:end] = [weight]
    return weights[-1] if weights else 0
