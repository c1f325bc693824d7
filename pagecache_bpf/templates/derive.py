# SPDX-License-Identifier: Apache-2.0
"""Derives a template from headers, in the order in which loaders really read.

Orders:
  keys     file by file, tensors by name: what safe_open(...).keys() gives, so transformers 4,
           vLLM and SGLang; of GGUF and PyTorch files the order that the header has
  offset   file by file, as the bytes lie
  natural  all files together, headers first, tensors by name with numbers as numbers:
           transformers 5
  list     all files together, in the order of a list of names
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagecache_bpf.errors import UsageError
from pagecache_bpf.templates.model_config import ModelConfig
from pagecache_bpf.templates.parallel import Parallel
from pagecache_bpf.templates.sharding import Sharding
from pagecache_bpf.templates.template import (
    EXTENT,
    MAX_EXTENTS,
    STRIDED,
    Extents,
    Template,
    coalesce,
)
from pagecache_bpf.templates.touches import with_touches
from pagecache_bpf.weights import headers
from pagecache_bpf.weights.contents import Contents
from pagecache_bpf.weights.models import Model
from pagecache_bpf.weights.names import dotted

ORDERS = ("keys", "offset", "natural")
#: Bytes between two slices that are read along, where nobody has measured what a request costs the
#: device (explain.device_speed.read_along_bytes()): none, so that nothing is read for nothing.
GAP = 0
ONE_RANK = Parallel()

_Place = tuple[int, int]  # number of a file, number of a tensor in it


def derive(
    model: Model,
    order: str = "keys",
    *,
    names: Sequence[str] | None = None,
    tp: int = 1,
    rank: int | None = None,
    gap: int = GAP,
    parallel: Parallel | None = None,
    unknown: list[str] | None = None,
) -> Template:
    """Derive the template of a model from the headers of its files only.

    Args:
        model: its files are read in its order.
        order: one of ORDERS.
        names: instead of `order`, the tensors in the order in which they are read; others are not
            in the template.
        tp: ranks, each with its slice of the tensors that are usually split.
        rank: only this rank; by default all of them, one consumer each.
        gap: bytes between two slices that are read along, since a seek would cost more.
        parallel: tensor, expert and pipeline parallelism together; instead of `tp`.
        unknown: names of tensors that no table of architectures has are appended: every rank reads
            those whole.

    Returns:
        The template.

    Raises:
        UsageError: there is no such order, no such rank, or no such tensor.
        PrivilegeError: a file may not be read.
        PagecacheError: a header is damaged.
    """
    all_contents = [headers.parse(path) for path in model.files]
    return derive_open(
        model, all_contents, order, names, parallel or Parallel(tp), rank, gap, unknown
    )


def derive_open(
    model: Model,
    all_contents: Sequence[Contents],
    order: str = "keys",
    names: Sequence[str] | None = None,
    parallel: Parallel = ONE_RANK,
    rank: int | None = None,
    gap: int = GAP,
    unknown: list[str] | None = None,
) -> Template:
    """Derive a template from headers that were read already; no weight file is opened.

    Args:
        model: its names and its directory, in which config.json is looked for, are used.
        all_contents: what headers.parse_open() said of its files, in their order.
        order: see derive(), as the others.
        names: see derive().
        parallel: see derive().
        rank: see derive().
        gap: see derive().
        unknown: see derive().

    Returns:
        The template.

    Raises:
        UsageError: there is no such order, no such rank, or no such tensor; or it would have more
            than MAX_EXTENTS extents.
    """
    ranks = range(parallel.world) if rank is None else (rank,)
    parallel.rank(ranks[-1])
    files = tuple(
        contents.file(name) for contents, name in zip(all_contents, model.names, strict=True)
    )
    places = _listed(all_contents, names) if names is not None else _ordered(all_contents, order)
    openings = _openings(places, names is None and order == "natural")
    if parallel.world == 1:
        parts = [_whole(all_contents, places, openings)]
    else:
        config = ModelConfig.beside(model.directory)
        shapes = {
            name: shape
            for contents in all_contents
            if contents.kind == "safetensors"
            for name, shape in zip(contents.names, contents.shapes, strict=True)
        }
        sharding = Sharding(config, parallel, shapes, gap)
        parts = _sliced(all_contents, places, openings, sharding, ranks)
        if unknown is not None:
            unknown += sharding.unknown.values()
    extents = np.concatenate(parts)
    if len(extents) > MAX_EXTENTS:
        raise UsageError(
            f"the template would have {len(extents):,} extents",
            f"{MAX_EXTENTS:,} are possible",
            "Derive one rank at a time (--rank), or join more (--gap)",
        )
    kinds = "+".join(sorted({contents.kind for contents in all_contents}))
    loader = f"{kinds} {'list' if names is not None else order}"
    for name, count in (("ep", parallel.ep), ("pp", parallel.pp)):
        loader += f" {name} {count}" if count > 1 else ""
    return Template(
        files,
        tuple(f"rank {number}" for number in ranks) if parallel.world > 1 else ("loader",),
        extents,
        "derived",
        loader,
        parallel.tp,
    )


def _ordered(all_contents: Sequence[Contents], order: str) -> list[_Place]:
    """Return all tensors in one of ORDERS.  Raises UsageError."""
    if order not in ORDERS:
        raise UsageError(f"there is no order {order}", f"known are {', '.join(ORDERS)}")
    if order == "natural":
        places = [
            (f, t) for f, contents in enumerate(all_contents) for t in range(len(contents.names))
        ]
        return sorted(places, key=lambda at: dotted(all_contents[at[0]].names[at[1]]))
    places = []
    for number, contents in enumerate(all_contents):
        tensors: Sequence[int] = range(len(contents.names))
        if order == "offset":
            tensors = np.argsort(contents.offsets, kind="stable").tolist()
        elif contents.kind == "safetensors":
            tensors = sorted(tensors, key=contents.names.__getitem__)
        places += [(number, tensor) for tensor in tensors]
    return places


def _listed(all_contents: Sequence[Contents], names: Sequence[str]) -> list[_Place]:
    """Return the tensors of a list in its order.  Raises UsageError if one is not in the files."""
    known = {
        name: (file, tensor)
        for file, contents in enumerate(all_contents)
        for tensor, name in enumerate(contents.names)
    }
    missing = [name for name in names if name not in known]
    if missing:
        raise UsageError(
            f"the list names {len(missing)} tensors that the files do not have",
            f"the first is {missing[0][:100]!r}",
            "Make the list from these files",
        )
    return [known[name] for name in dict.fromkeys(names)]


def _openings(places: Sequence[_Place], together: bool) -> dict[int, list[int]]:
    """Return which files are opened, and their headers read, before which of the places.

    Each before its first tensor, or all of them together before any tensor, as transformers 5 does.
    """
    found: dict[int, list[int]] = {}
    if together:
        return {0: sorted({file for file, _ in places})}
    opened = set()
    for place, (file, _) in enumerate(places):
        if file not in opened:
            opened.add(file)
            found[place] = [file]
    return found


def _whole(
    all_contents: Sequence[Contents], places: Sequence[_Place], openings: dict[int, list[int]]
) -> Extents:
    """Return the extents of a loader that reads every tensor whole."""
    rows: list[tuple[int, int, int, int, int]] = []
    for place, (file, tensor) in enumerate(places):
        for opened in openings.get(place, ()):
            size = all_contents[opened].header_bytes
            rows.append((0, opened, all_contents[opened].header_from, size, size))
        contents = all_contents[file]
        offset, length = int(contents.offsets[tensor]), int(contents.lengths[tensor])
        if length:
            rows.append((0, file, offset, length, length))
    # Neighbors are joined where nothing lies between: a joined extent would hide the order.
    return coalesce(np.array(rows, EXTENT))


def _sliced(
    all_contents: Sequence[Contents],
    places: Sequence[_Place],
    openings: dict[int, list[int]],
    sharding: Sharding,
    ranks: Sequence[int],
) -> list[Extents]:
    """Return the extents of each rank.

    A file's header comes where it is opened, and a tensor's first byte before its slices.
    """
    rows: list[list[tuple[int, int, int, int, int, int, int]]] = [[] for _ in ranks]
    numbers: list[list[int]] = [[] for _ in ranks]  # of the places of those rows
    consumers = {number: consumer for consumer, number in enumerate(ranks)}
    files, offsets, lengths = (np.full(len(places), -1, np.int64) for _ in range(3))
    total = 0
    for place, (file, tensor) in enumerate(places):
        contents = all_contents[file]
        for opened in openings.get(place, ()):
            size = all_contents[opened].header_bytes
            header = (all_contents[opened].header_from, size, size)
            for consumer, own in enumerate(rows):
                own.append((consumer, opened, *header, 1, 0))
                numbers[consumer].append(-1 - place)
        offset, length = int(contents.offsets[tensor]), int(contents.lengths[tensor])
        if not length:
            continue
        shape: tuple[int, ...] = ()
        if contents.kind == "safetensors":
            shape = contents.shapes[tensor]
            files[place], offsets[place], lengths[place] = file, offset, length
        for number, pieces in sharding.readers(contents.names[tensor], shape, length):
            if number not in consumers:
                continue
            at = consumers[number]
            for begin, size, used, count, stride in pieces:
                rows[at].append((at, file, offset + begin, size, used, count, stride))
            numbers[at] += [place] * len(pieces)
            total += len(pieces)
        if total > MAX_EXTENTS:
            break
    parts = []
    for consumer, (own, of_places) in enumerate(zip(rows, numbers, strict=True)):
        made = np.array(own, STRIDED)
        own.clear()
        at_places = np.array(of_places, np.int64)
        parts.append(coalesce(with_touches(made, at_places, files, offsets, lengths, consumer)))
    return parts
