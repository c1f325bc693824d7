# SPDX-License-Identifier: Apache-2.0
"""Lays templates out for policies: the arrays of bpf/include/template.bpf.h.

Extents become ranges of pages of at most PIECE bytes, so that progress within a long one can be
seen.  Consumers that want the same range share it, bytes that one consumer wants again are
left out: they are cached by then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.templates.intervals import Intervals
from pagecache_bpf.templates.template import Template, counts, expanded, strides

#: Bytes of one step at most, and its alignment where that cuts it.
PIECE = 8 << 20
#: Steps of a template that a policy's maps hold at most, where slices of rows are many.
MAX_STEPS = 1 << 20
#: Gaps that are that many times as long as what lies between them are never read along.
_FAR_APART = 64
#: Pages that are not worth an extent of their own.
CRUMB = 16
_SOURCE = {
    "derived": abi.TemplateSource.DERIVED,
    "recorded": abi.TemplateSource.RECORDED,
    "imported": abi.TemplateSource.IMPORTED,
}

Array = np.ndarray[Any, Any]
#: The arrays, in the order in which they are written, and their elements.
ARRAYS: dict[str, type[ctypes.Structure]] = {
    "template_models": abi.pagecache_template_model,
    "template_consumers": abi.pagecache_template_consumer,
    "template_targets": abi.pagecache_template_target,
    "template_spans": abi.pagecache_template_span,
    "template_index": abi.pagecache_template_entry,
    "template_steps": abi.pagecache_template_step,
    "template_extents": abi.pagecache_template_extent,
}
FILES = "template_files"
NONE = abi.TEMPLATE_NONE


@dataclass(frozen=True)
class Identity:
    """How the kernel knows a file: the members of struct pagecache_file_key.

    Attributes:
        dev_major: major number of the file system's device.
        dev_minor: its minor number.
        ino: the inode's number.
        generation: the inode's generation.
    """

    dev_major: int
    dev_minor: int
    ino: int
    generation: int


@dataclass
class Layout:
    """Templates as the maps of a policy hold them.

    Attributes:
        arrays: elements of each array, by the name of its map.
        files: keys and values for the map template_files.
    """

    arrays: dict[str, Array]
    files: list[tuple[bytes, bytes]]

    def sizes(self) -> dict[str, int]:
        """Count the elements of each array.

        Returns:
            Elements by the name of the map.
        """
        return {name: len(array) for name, array in self.arrays.items()}


def lay_out(
    models: Sequence[tuple[str, Template]],
    identity: Callable[[str, int], Identity | None] = lambda name, file: None,
    page_size: int = PAGE_SIZE,
    first: Mapping[str, int] | None = None,
) -> Layout:
    """Lay out templates as the arrays of bpf/include/template.bpf.h.

    Args:
        models: names of models and their templates.
        identity: tells how the kernel knows a file, by the model's name and the file's number in
            its template; None: the file is not tagged, and a policy cannot find it.
        page_size: bytes of a page.
        first: where the elements will stand in each array, by the name of its map; 0 by default.

    Returns:
        The arrays, and the entries of template_files.
    """
    arrays: dict[str, list[Array]] = {name: [] for name in ARRAYS}
    used = {name: (first or {}).get(name, 0) for name in ARRAYS}
    files: list[tuple[bytes, bytes]] = []

    def add(name: str, array: Array) -> None:
        arrays[name].append(array)
        used[name] += len(array)

    for number, (name, template) in enumerate(models, used["template_models"]):
        first_file, first_consumer = used["template_targets"], used["template_consumers"]
        nr_files, nr_consumers = len(template.files), len(template.consumers)
        first_span = used["template_spans"]
        steps, extents = _steps(template, page_size)
        model = np.zeros(1, ARRAYS["template_models"])
        model["first_consumer"], model["nr_consumers"] = first_consumer, nr_consumers
        model["source"] = _SOURCE[template.source]
        model["name"] = np.frombuffer(name.encode()[:63].ljust(64, b"\0"), "S1")
        targets = np.zeros(nr_files, ARRAYS["template_targets"])
        for file, described in enumerate(template.files):
            targets["pages"][file] = -(-described.size // page_size)
            known = identity(name, file)
            if known is None:
                continue
            key = abi.pagecache_file_key(
                ino=known.ino,
                dev_major=known.dev_major,
                dev_minor=known.dev_minor,
                generation=known.generation,
            )
            targets["key"][file] = np.frombuffer(bytes(key), targets["key"].dtype)[0]
            value = abi.pagecache_template_file(
                file=first_file + file, model=number, spans=first_span + file * nr_consumers
            )
            files.append((bytes(key), bytes(value)))
        consumers, spans, index, table = _tables(
            steps, extents, nr_files, nr_consumers, used["template_steps"], used["template_index"]
        )
        table["extent"] += used["template_extents"]
        extents["file"] += first_file
        for bringer in ("before", "behind"):
            extents[bringer][extents[bringer] != NONE] += used["template_extents"]
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
    """Return the steps of all consumers, and the extents that they share, each once."""
    wanted = _single_ranges(template.extents, page_size)
    rows = np.zeros(len(wanted), _STEP)
    rows["consumer"], rows["file"] = wanted["consumer"], wanted["file"]
    rows["start"] = wanted["offset"] // page_size
    rows["end"] = (wanted["offset"] + wanted["length"] + (page_size - 1)) // page_size
    rows = _without_repeats(_joined(rows))
    if len(template.consumers) > 1:
        rows = _cut_alike(rows)
    rows = _cut(rows, PIECE // page_size)
    unique, which, users = np.unique(
        rows[["file", "start", "end"]], return_inverse=True, return_counts=True
    )
    extents = np.zeros(len(unique), ARRAYS["template_extents"])
    for name in ("file", "start", "end"):
        extents[name] = unique[name]
    extents["users"] = users
    sizes = np.array([file.size for file in template.files], np.int64) // page_size
    # A shorter extent does not bring in the rest of one.
    huge = abi.HUGE_BYTES // page_size
    extents["edges"] = _shared(extents) | _whole(extents, sizes, huge)
    extents["before"], extents["behind"] = _bringers(extents, huge)
    steps = np.zeros(len(rows), [("consumer", "u4"), ("file", "u4"), ("extent", "u4")])
    steps["consumer"], steps["file"] = rows["consumer"], rows["file"]
    steps["extent"] = which.reshape(-1)
    return steps, extents


def _single_ranges(extents: Array, page_size: int) -> Array:
    """Return extents of which none is strided, at most about MAX_STEPS of them.

    Rows whose gaps have no whole page become one range, since their pages are neighbors.  Where the
    rest would be too many for a policy's maps, those with the smallest gaps are read along; ranges
    so far apart that nearly all of it would be read for nothing (first bytes of tensors that
    another rank has) are left to their reader instead.
    """
    many = counts(extents).astype(np.int64)
    if not np.any(many > 1):
        return extents
    gaps = strides(extents).astype(np.int64) - extents["length"].astype(np.int64)
    whole = (many > 1) & (gaps <= page_size)
    left = np.flatnonzero((many > 1) & ~whole)
    left = left[np.argsort(gaps[left], kind="stable")]
    over = int(np.where(whole, 1, many).sum()) - MAX_STEPS
    if over > 0:
        saved = np.cumsum(many[left] - 1)
        whole[left[: int(np.searchsorted(saved, over)) + 1]] = True
    length = np.maximum(extents["length"].astype(np.int64), page_size)
    apart = whole & (gaps > _FAR_APART * length)
    chosen = extents.copy()
    reach = strides(extents) * (counts(extents) - np.uint64(1)) + extents["length"]
    chosen["length"] = np.where(whole, reach, extents["length"])
    chosen["count"] = np.where(whole, 1, counts(extents))
    chosen["stride"] = np.where(whole, 0, strides(extents))
    return expanded(chosen[~apart])


def _shared(extents: Array) -> Array:
    """Return flags: which of an extent's first and last pages lie in another extent as well."""
    base = extents["file"].astype(np.int64) << 33
    starts, ends = np.sort(base + extents["start"]), np.sort(base + extents["end"])
    flags = np.zeros(len(extents), np.uint32)
    for flag, page in (
        (abi.TEMPLATE_SHARED_FIRST, base + extents["start"]),
        (abi.TEMPLATE_SHARED_LAST, base + extents["end"] - 1),
    ):
        begun = np.searchsorted(starts, page, side="right")
        over = np.searchsorted(ends, page, side="right")
        flags[begun - over > 1] |= flag
    return flags


def _whole(extents: Array, sizes: Array, huge: int) -> Array:
    """Return flags: which extents begin or end in a huge page that is wanted as a whole.

    A huge page is filled whole, so one of the extents that want a part of it brings it in for all.
    `sizes` are those of the files and `huge` that of a huge page, in pages.
    """
    flags = np.zeros(len(extents), np.uint32)
    if not len(extents):
        return flags
    base = extents["file"].astype(np.int64) << 33
    order = np.argsort(base + extents["start"], kind="stable")
    starts = (base + extents["start"])[order]
    reach = np.maximum.accumulate((base + extents["end"])[order])
    begins = np.flatnonzero(np.concatenate(([True], starts[1:] > reach[:-1])))
    starts, ends = starts[begins], reach[np.append(begins[1:], len(reach)) - 1]
    long = extents["end"] - extents["start"] >= huge
    for flag, page in (
        (abi.TEMPLATE_WHOLE_FIRST, extents["start"].astype(np.int64)),
        (abi.TEMPLATE_WHOLE_LAST, extents["end"].astype(np.int64) - 1),
    ):
        first = page // huge * huge
        union = np.searchsorted(starts, base + first, side="right") - 1
        wanted = (union >= 0) & (ends[union] >= base + first + huge)
        flags[long & wanted & (first + huge <= sizes[extents["file"]])] |= flag
    return flags


def _bringers(extents: Array, huge: int) -> tuple[Array, Array]:
    """Return which extents bring in the huge pages where each one begins and ends, or NONE."""
    base = extents["file"].astype(np.int64) << 33
    first = base + extents["start"] // huge
    last = base + (extents["end"].astype(np.int64) - 1) // huge

    def find(flag: int, has: Array, wants: Array) -> Array:
        those = np.flatnonzero(extents["edges"] & flag)
        those = those[np.argsort(has[those], kind="stable")]
        found = np.full(len(extents), NONE, np.uint32)
        if len(those):
            at = np.minimum(np.searchsorted(has[those], wants), len(those) - 1)
            right = has[those][at] == wants
            found[right] = those[at][right]
        return found

    return (
        find(abi.TEMPLATE_WHOLE_LAST, last, first),
        find(abi.TEMPLATE_WHOLE_FIRST, first, last),
    )


def _joined(rows: Array) -> Array:
    """Join rows of one consumer that touch and follow each other."""
    if len(rows) < 2:
        return rows
    same = (rows["file"][1:] == rows["file"][:-1]) & (rows["consumer"][1:] == rows["consumer"][:-1])
    same &= (rows["start"][1:] <= rows["end"][:-1]) & (rows["start"][1:] + 1 >= rows["end"][:-1])
    first = np.flatnonzero(np.concatenate(([True], ~same)))
    joined: Array = rows[first].copy()
    joined["end"] = np.maximum.reduceat(rows["end"], first)
    return joined


def _without_repeats(rows: Array) -> Array:
    """Take out of a consumer's steps what it has had in earlier ones: it is cached by then."""
    order = np.lexsort((rows["start"], rows["file"], rows["consumer"]))
    ordered = rows[order]
    same = (ordered["file"][1:] == ordered["file"][:-1]) & (
        ordered["consumer"][1:] == ordered["consumer"][:-1]
    )
    # Neighbors in the file share a page where one ends and the other begins: no repeat.
    if not np.any(same & (ordered["start"][1:] + 1 < ordered["end"][:-1])):
        return rows
    seen: dict[tuple[int, int], Intervals] = {}
    kept: list[tuple[int, int, int, int]] = []
    for consumer, file, start, end in rows.tolist():
        intervals = seen.setdefault((consumer, file), Intervals())
        kept += [(consumer, file, *part) for part in intervals.add(start, end)]
    return np.array(kept, _STEP)


def _cut_alike(rows: Array) -> Array:
    """Cut where another consumer's steps begin and end, so that what both want is one extent.

    Cuts closer than CRUMB pages to the one before are left out: their extents would be too small to
    be worth a request.
    """
    parts = []
    order = np.argsort(rows["file"], kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(rows["file"][order])) + 1):
        some = rows[own]
        edges, last = [], -CRUMB
        for edge in np.unique(np.concatenate((some["start"], some["end"]))).tolist():
            if edge - last >= CRUMB:
                edges.append(edge)
                last = edge
        at = np.array(edges, np.int64)
        first = np.searchsorted(at, some["start"], side="right")
        inside = np.maximum(np.searchsorted(at, some["end"], side="left") - first, 0)
        many = np.repeat(np.arange(len(some)), inside + 1)
        number = np.arange(len(many)) - np.repeat(np.cumsum(inside + 1) - inside - 1, inside + 1)
        cut = some[many].copy()
        later = number > 0
        cut["start"][later] = at[(first[many] + number - 1)[later]]
        earlier = number < inside[many]
        cut["end"][earlier] = at[(first[many] + number)[earlier]]
        parts.append((own[many], cut))
    places = np.concatenate([place for place, _ in parts])
    cut = np.concatenate([part for _, part in parts])
    joined: Array = cut[np.argsort(places, kind="stable")]
    return joined


def _cut(rows: Array, pages: int) -> Array:
    """Cut long steps at multiples of `pages`."""
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
    """Return template_consumers, _spans, _index and _steps of one model."""
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
    # In the order of file and consumer the next of both is the neighbor.
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
