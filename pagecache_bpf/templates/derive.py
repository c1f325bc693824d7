# SPDX-License-Identifier: Apache-2.0
"""Derives a template from headers, in the order in which loaders really read.

Orders:
  keys     file by file, tensors by name: what safe_open(...).keys() gives, so transformers 4,
           vLLM and SGLang; of GGUF and PyTorch files the order that the header has
  offset   file by file, as the bytes lie
  natural  all files together, tensors by name with numbers as numbers: transformers 5
  list     all files together, in the order of a list of names
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_key import read_small_file
from pagecache_bpf.templates.sharding import Config, slices
from pagecache_bpf.templates.template import EXTENT, MAX_EXTENTS, Extents, Template, coalesce
from pagecache_bpf.weights import headers
from pagecache_bpf.weights.contents import Contents
from pagecache_bpf.weights.models import Model
from pagecache_bpf.weights.names import natural

ORDERS = ("keys", "offset", "natural")
#: Bytes between two slices that are not worth a seek.
GAP = 64 << 10
_CONFIG_BYTES = 1 << 20

_Place = tuple[int, int]  # number of a file, number of a tensor in it


def derive(
    model: Model,
    order: str = "keys",
    *,
    names: Sequence[str] | None = None,
    tp: int = 1,
    rank: int | None = None,
    gap: int = GAP,
) -> Template:
    """The template of a model: all its tensors, by their headers only.

    order: one of ORDERS.  names: instead of it, the tensors in the order in which they are
    read; others are not in the template.  tp: ranks, each with its slice of the tensors that
    are usually split; rank: only this one.  gap: slices closer than this (bytes) are read as
    one.  Raises UsageError, PagecacheError (a header is damaged), PrivilegeError.
    """
    if rank is not None and not 0 <= rank < tp:
        raise UsageError(f"there is no rank {rank}", f"of {tp} ranks the last is {tp - 1}")
    every = [headers.parse(path) for path in model.files]
    files = tuple(contents.file(name) for contents, name in zip(every, model.names, strict=True))
    places = _listed(every, names) if names is not None else _ordered(every, order)
    config = _config(model.directory)
    ranks = range(tp) if rank is None else (rank,)
    parts = [
        _extents(every, places, config, number, tp, each, gap) for number, each in enumerate(ranks)
    ]
    extents = np.concatenate(parts)
    if len(extents) > MAX_EXTENTS:
        raise UsageError(
            f"the template would have {len(extents):,} extents",
            f"{MAX_EXTENTS:,} are possible",
            "Derive one rank at a time (--rank), or join more (--gap)",
        )
    kinds = "+".join(sorted({each.kind for each in every}))
    return Template(
        files,
        tuple(f"rank {each}" for each in ranks) if tp > 1 else ("loader",),
        extents,
        "derived",
        f"{kinds} {'list' if names is not None else order}",
        tp,
    )


def _ordered(every: list[Contents], order: str) -> list[_Place]:
    if order not in ORDERS:
        raise UsageError(f"there is no order {order}", f"known are {', '.join(ORDERS)}")
    if order == "natural":
        places = [(f, t) for f, each in enumerate(every) for t in range(len(each.names))]
        return sorted(places, key=lambda at: natural(every[at[0]].names[at[1]]))
    places = []
    for number, each in enumerate(every):
        tensors: Sequence[int] = range(len(each.names))
        if order == "offset":
            tensors = np.argsort(each.offsets, kind="stable").tolist()
        elif each.kind == "safetensors":
            tensors = sorted(tensors, key=each.names.__getitem__)
        places += [(number, tensor) for tensor in tensors]
    return places


def _listed(every: list[Contents], names: Sequence[str]) -> list[_Place]:
    known = {name: (f, t) for f, each in enumerate(every) for t, name in enumerate(each.names)}
    missing = [name for name in names if name not in known]
    if missing:
        raise UsageError(
            f"the list names {len(missing)} tensors that the files do not have",
            f"the first is {missing[0][:100]!r}",
            "Make the list from these files",
        )
    return [known[name] for name in dict.fromkeys(names)]


def _extents(
    every: list[Contents],
    places: list[_Place],
    config: Config,
    consumer: int,
    tp: int,
    rank: int,
    gap: int,
) -> Extents:
    """The extents of one rank: each file's header before its first tensor, then its slices."""
    rows: list[tuple[int, int, int, int, int]] = []
    opened = set()
    for file, tensor in places:
        contents = every[file]
        if file not in opened:
            opened.add(file)
            begin, length = contents.header_from, contents.header_bytes
            rows.append((consumer, file, begin, length, length))
        offset, length = int(contents.offsets[tensor]), int(contents.lengths[tensor])
        if not length:
            continue
        if tp == 1 or not contents.shapes:
            rows.append((consumer, file, offset, length, length))
            continue
        shape, itemsize = contents.shapes[tensor], contents.itemsize[tensor]
        found = slices(contents.names[tensor], shape, itemsize, length, config, tp, rank, gap)
        rows += [(consumer, file, offset + at, size, used) for at, size, used in found]
        if len(rows) > MAX_EXTENTS:
            break
    # Neighbours are joined where nothing lies between: a joined extent would hide the order.
    return coalesce(np.array(rows, EXTENT))


def _config(base: Path) -> Config:
    """What the model's config.json says about heads; nothing where there is none."""
    try:
        content = json.loads(read_small_file(base / "config.json", _CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return Config()
    if not isinstance(content, dict):
        return Config()
    if isinstance(content.get("text_config"), dict):
        content = content["text_config"]
    heads = content.get("num_key_value_heads", content.get("num_attention_heads"))
    return Config(heads if type(heads) is int and 0 < heads < 1 << 16 else 0)
