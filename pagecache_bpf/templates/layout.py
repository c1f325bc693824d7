# SPDX-License-Identifier: Apache-2.0
"""Lays templates out for policies: the arrays of bpf/include/template.bpf.h.

Extents become ranges of pages of at most PIECE bytes, so that progress within a long one can be
seen.  Consumers that want the same range share it, bytes that one consumer wants again are
left out: they are cached by then.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagecache_bpf import _abi
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.templates.intervals import Intervals
from pagecache_bpf.templates.template import Template

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
#: Bytes of one step at most, and its alignment where that cuts it.
PIECE = 8 << 20
_SOURCE = {
    "derived": _abi.TemplateSource.DERIVED,
    "recorded": _abi.TemplateSource.RECORDED,
    "imported": _abi.TemplateSource.IMPORTED,
}

Array = np.ndarray[Any, Any]
#: The arrays, in the order in which they are written, and their elements.
ARRAYS: dict[str, type[ctypes.Structure]] = {
    "template_models": _abi.pagecache_template_model,
    "template_consumers": _abi.pagecache_template_consumer,
    "template_targets": _abi.pagecache_template_target,
    "template_spans": _abi.pagecache_template_span,
    "template_index": _abi.pagecache_template_entry,
    "template_steps": _abi.pagecache_template_step,
    "template_extents": _abi.pagecache_template_extent,
}
FILES = "template_files"
NONE = _abi.TEMPLATE_NONE


@dataclass(frozen=True)
class Identity:
    """How the kernel knows a file; see pagecache_file_key."""

    dev_major: int
    dev_minor: int
    ino: int
    generation: int


@dataclass
class Layout:
    """Arrays by the name of their map, and what template_files gets: (key, value)."""

    arrays: dict[str, Array]
    files: list[tuple[bytes, bytes]]

    def sizes(self) -> dict[str, int]:
        """Elements of each map."""
        return {name: len(array) for name, array in self.arrays.items()}


def lay_out(
    models: Sequence[tuple[str, Template]],
    identity: Callable[[str, int], Identity | None] = lambda name, file: None,
    page_size: int = PAGE_SIZE,
) -> Layout:
    """The arrays of named templates.

    identity: of a model's file, by the model's name and the file's number in its template; a
    file that has none (it is not tagged) cannot be found by a policy.
    """
    arrays: dict[str, list[Array]] = {name: [] for name in ARRAYS}
    used = dict.fromkeys(ARRAYS, 0)
    files: list[tuple[bytes, bytes]] = []

    def add(name: str, array: Array) -> None:
        arrays[name].append(array)
        used[name] += len(array)

    for number, (name, template) in enumerate(models):
        first_file, first_consumer = used["template_targets"], used["template_consumers"]
        nr_files, nr_consumers = len(template.files), len(template.consumers)
        first_span = used["template_spans"]
        steps, extents = _steps(template, page_size)
        model = np.zeros(1, ARRAYS["template_models"])
        model["first_consumer"], model["nr_consumers"] = first_consumer, nr_consumers
        model["source"] = _SOURCE[template.source]
        model["name"] = np.frombuffer(name.encode()[:63].ljust(64, b"\0"), "S1")
        targets = np.zeros(nr_files, ARRAYS["template_targets"])
        for file, each in enumerate(template.files):
            targets["pages"][file] = -(-each.size // page_size)
            known = identity(name, file)
            if known is None:
                continue
            key = _abi.pagecache_file_key(
                ino=known.ino,
                dev_major=known.dev_major,
                dev_minor=known.dev_minor,
                generation=known.generation,
            )
            targets["key"][file] = np.frombuffer(bytes(key), targets["key"].dtype)[0]
            value = _abi.pagecache_template_file(
                file=first_file + file, model=number, spans=first_span + file * nr_consumers
            )
            files.append((bytes(key), bytes(value)))
        consumers, spans, index, table = _tables(
            steps, extents, nr_files, nr_consumers, used["template_steps"], used["template_index"]
        )
        table["extent"] += used["template_extents"]
        extents["file"] += first_file
        add("template_models", model)
        add("template_consumers", consumers)
        add("template_targets", targets)
        add("template_spans", spans)
        add("template_index", index)
        add("template_steps", table)
        add("template_extents", extents)
    joined = {
        name: np.concatenate(parts) if parts else np.zeros(0, ARRAYS[name])
        for name, parts in arrays.items()
    }
    return Layout(joined, files)


_STEP = np.dtype([("consumer", "u4"), ("file", "u4"), ("start", "i8"), ("end", "i8")])


def _steps(template: Template, page_size: int) -> tuple[Array, Array]:
    """Steps of all consumers with the number of their extent; the extents without doubles."""
    rows = np.zeros(len(template.extents), _STEP)
    rows["consumer"], rows["file"] = template.extents["consumer"], template.extents["file"]
    rows["start"] = template.extents["offset"] // page_size
    rows["end"] = (
        template.extents["offset"] + template.extents["length"] + (page_size - 1)
    ) // page_size
    rows = _cut(_without_repeats(_joined(rows)), PIECE // page_size)
    unique, which, users = np.unique(
        rows[["file", "start", "end"]], return_inverse=True, return_counts=True
    )
    extents = np.zeros(len(unique), ARRAYS["template_extents"])
    for name in ("file", "start", "end"):
        extents[name] = unique[name]
    extents["users"] = users
    steps = np.zeros(len(rows), [("consumer", "u4"), ("file", "u4"), ("extent", "u4")])
    steps["consumer"], steps["file"] = rows["consumer"], rows["file"]
    steps["extent"] = which.reshape(-1)
    return steps, extents


def _joined(rows: Array) -> Array:
    """Neighbours that touch become one."""
    if len(rows) < 2:
        return rows
    same = (rows["file"][1:] == rows["file"][:-1]) & (rows["consumer"][1:] == rows["consumer"][:-1])
    same &= (rows["start"][1:] <= rows["end"][:-1]) & (rows["start"][1:] + 1 >= rows["end"][:-1])
    first = np.flatnonzero(np.concatenate(([True], ~same)))
    joined: Array = rows[first].copy()
    joined["end"] = np.maximum.reduceat(rows["end"], first)
    return joined


def _without_repeats(rows: Array) -> Array:
    """What a consumer has had before is taken out of its later steps."""
    order = np.lexsort((rows["start"], rows["file"], rows["consumer"]))
    ordered = rows[order]
    same = (ordered["file"][1:] == ordered["file"][:-1]) & (
        ordered["consumer"][1:] == ordered["consumer"][:-1]
    )
    # Neighbours in the file share a page where one ends and the other begins: no repeat.
    if not np.any(same & (ordered["start"][1:] + 1 < ordered["end"][:-1])):
        return rows
    seen: dict[tuple[int, int], Intervals] = {}
    kept: list[tuple[int, int, int, int]] = []
    for consumer, file, start, end in rows.tolist():
        intervals = seen.setdefault((consumer, file), Intervals())
        kept += [(consumer, file, *part) for part in intervals.add(start, end)]
    return np.array(kept, _STEP)


def _cut(rows: Array, pages: int) -> Array:
    """Long steps become several, cut where a multiple of `pages` is."""
    first = rows["start"] // pages
    pieces = (np.maximum(rows["end"], 1) - 1) // pages - first + 1
    many = np.repeat(np.arange(len(rows)), pieces)
    number = np.arange(len(many)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut: Array = rows[many].copy()
    edges = (first[many] + number) * pages
    cut["start"] = np.maximum(cut["start"], edges)
    cut["end"] = np.minimum(cut["end"], edges + pages)
    return cut


def _tables(
    steps: Array,
    extents: Array,
    nr_files: int,
    nr_consumers: int,
    first_step: int,
    first_entry: int,
) -> tuple[Array, Array, Array, Array]:
    """template_consumers, _spans, _index and _steps of one model."""
    consumers = np.zeros(nr_consumers, ARRAYS["template_consumers"])
    begins = np.searchsorted(steps["consumer"], np.arange(nr_consumers + 1))
    consumers["first_step"] = begins[:-1] + first_step
    consumers["nr_steps"] = np.diff(begins)
    table = np.zeros(len(steps), ARRAYS["template_steps"])
    table["extent"] = steps["extent"]
    pages = (extents["end"] - extents["start"])[steps["extent"]].astype(np.uint64)
    before = np.cumsum(pages) - pages
    if len(steps):
        own = np.minimum(begins[:-1], len(steps) - 1)[steps["consumer"]]
        table["before"] = before - before[own]
    # In the order of file and consumer the next of both is the neighbour.
    group = steps["file"].astype(np.int64) * nr_consumers + steps["consumer"]
    by_group = np.argsort(group, kind="stable")
    table["next"] = NONE
    if len(steps) > 1:
        same = group[by_group][1:] == group[by_group][:-1]
        table["next"][by_group[:-1][same]] = by_group[1:][same] + first_step
    by_page = np.lexsort((extents["start"][steps["extent"]], group))
    index = np.zeros(len(steps), ARRAYS["template_index"])
    index["start"] = extents["start"][steps["extent"]][by_page]
    index["step"] = by_page + first_step
    edges = np.searchsorted(group[by_page], np.arange(nr_files * nr_consumers + 1))
    spans = np.zeros(nr_files * nr_consumers, ARRAYS["template_spans"])
    spans["first"] = edges[:-1] + first_entry
    spans["nr"] = np.diff(edges)
    return consumers, spans, index, table


def check_room(layout: Layout, capacities: Mapping[str, int]) -> None:
    """Raise PagecacheError when the maps of an attached policy are too small."""
    for name, size in layout.sizes().items():
        if size > capacities[name]:
            raise PagecacheError(
                "the template was not given to the policy",
                f"its map {name} has room for {capacities[name]:,} elements, not for {size:,}",
                "Detach the policy, and attach it with this template",
            )
