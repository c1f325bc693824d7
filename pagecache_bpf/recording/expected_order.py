# SPDX-License-Identifier: Apache-2.0
"""The order in which a template expects a load to want the bytes, as a recording keeps it.

A recording keeps the order that the policy follows; where none does, the one that a policy would
derive from the headers, so that the page shows what a template would have been worth.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.file_key import key_of, open_to_read
from pagecache_bpf.policy.engines import Engines
from pagecache_bpf.recording.format import EXPECTED, ExpectedOrder
from pagecache_bpf.weights.models import Model

#: So many ranges of a template go into a recording at most; more are joined.
MAX_RANGES = 20_000


def of_model(
    model: Model, cell_bytes: int, template: Path | None = None, policy: str = ""
) -> ExpectedOrder:
    """Return the order in which a model's load was expected to want its bytes.

    Args:
        model: what is loaded.
        cell_bytes: the size of a cell of the recording; a range is not told more finely.
        template: the template that the load was given; None: none was.
        policy: what governs the files; if it follows a template now, that one is meant.

    Returns:
        The order; an empty one where the headers tell of none.
    """
    if policy:
        followed = _followed(model, policy)
        if followed is not None:
            return bounded(followed, cell_bytes)
    from pagecache_bpf import templates
    from pagecache_bpf.templates import fit

    try:
        found = templates.derive(model) if template is None else templates.read(template)
        places = fit.locate(found, model)
    except PagecacheError:
        return ExpectedOrder()
    extents = found.plain()
    number = _numbers(model.files, places)[extents["file"].astype(np.int64)]
    table = np.zeros(len(extents), EXPECTED)
    table["consumer"], table["file"] = extents["consumer"], number
    table["offset"], table["bytes"] = extents["offset"], extents["length"]
    name = f"{found.source}: {found.loader}" if found.loader else found.source
    return bounded(ExpectedOrder(name, table[number >= 0]), cell_bytes)


def _numbers(files: Sequence[Path], places: Sequence[Path]) -> npt.NDArray[np.int64]:
    """Return the number of the recorded file at each place; -1: it is not recorded."""
    known = {path: number for number, path in enumerate(files)}
    return np.array([known.get(place, -1) for place in places], np.int64)


def _followed(model: Model, policy: str) -> ExpectedOrder | None:
    """Return the order of the template that a policy has for the model; None: it has none."""
    from pagecache_bpf.templates.policy_arrays import orders

    keys: dict[bytes, int] = {}
    for number, path in enumerate(model.files):
        fd = open_to_read(path)
        try:
            keys[key_of(fd)] = number
        finally:
            os.close(fd)
    try:
        with Engines() as engines:
            for order in orders(engines, policy):
                rows = [
                    (consumer, keys[key], start, end - start)
                    for consumer, key, start, end in order.ranges
                    if key in keys
                ]
                if rows:
                    return ExpectedOrder(order.source, np.array(rows, EXPECTED))
    except PagecacheError:
        pass
    return None


def bounded(order: ExpectedOrder, cell_bytes: int) -> ExpectedOrder:
    """Join the ranges of an order as far as a recording tells no more.

    Args:
        order: the order of a template.
        cell_bytes: the size of a cell of the recording.

    Returns:
        The order with neighbors within a cell joined, and about MAX_RANGES ranges at most: the
        rest is joined with the range before it.  No byte is lost, and each consumer keeps its
        first range.
    """
    table: Any = order.ranges
    if not len(table):
        return order
    cell = table["offset"] // max(1, cell_bytes)
    same = (np.diff(cell) == 0) & (np.diff(table["file"]) == 0) & (np.diff(table["consumer"]) == 0)
    first = np.flatnonzero(np.concatenate(([True], ~same)))
    while len(first) > MAX_RANGES:
        consumers = table["consumer"][first]
        kept = np.ones(len(first), bool)
        kept[1::2] = consumers[1::2] != consumers[: len(first) - 1 : 2]  # each keeps its first one
        if kept.all():
            break
        first = first[kept]
    joined = table[first].copy()
    joined["bytes"] = np.add.reduceat(table["bytes"], first)
    return ExpectedOrder(order.source, joined)
