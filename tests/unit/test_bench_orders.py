# SPDX-License-Identifier: Apache-2.0
"""The loaders that read in another order: what they get is right, and the template fits them."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks import loaders, orders
from benchmarks.cachestat import PAGE_SIZE
from benchmarks.checkpoints import data_offsets, generate
from pagecache_bpf.templates import derive
from pagecache_bpf.weights.models import Model, resolve

NAMES = [
    *("reversed layers", "interleaved shards", "half of the layers, reversed"),
    *("rank 0 of 2", "rank 0 of 8", "two ranks"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return generate(tmp_path_factory.mktemp("models") / "tiny", 4 << 20, shards=3)


@pytest.fixture(scope="module")
def reference(checkpoint: Model) -> loaders.Reference:
    return loaders.Reference(checkpoint.files)


def order(checkpoint: Model, name: str) -> orders.Order:
    return next(found for found in orders.make(checkpoint) if found.name == name)


def test_the_orders(checkpoint: Model) -> None:
    assert [found.name for found in orders.make(checkpoint)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_right(checkpoint: Model, reference: loaders.Reference, name: str) -> None:
    tested = order(checkpoint, name)
    outcome = orders.run(tested, reference)
    assert outcome.correct and outcome.loaded_bytes >= tested.wanted
    broken = loaders.Reference(checkpoint.files)
    broken.contents = [memoryview(bytes(len(content))) for content in broken.contents]
    assert not orders.run(tested, broken).correct


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wanted_in_pages(checkpoint: Model, name: str) -> None:
    """Each element's page, one by one."""
    tested = order(checkpoint, name)
    pages = set()
    for piece in {piece for rank in tested.ranks for piece in rank}:
        with safe_open(str(piece.path), framework="numpy") as file:
            shape = file.get_slice(piece.name).get_shape()
        offset, length = data_offsets(piece.path)[piece.name]
        places = offset + 2 * np.arange(length // 2).reshape(shape)
        if piece.axis >= 0:
            share = -(-shape[piece.axis] // piece.parts)
            at = range(piece.part * share, min((piece.part + 1) * share, shape[piece.axis]))
            places = places.take(at, piece.axis)
        pages |= {(piece.path, int(page)) for page in np.unique(places // PAGE_SIZE)}
        pages.add((piece.path, 0))
    headers = sum(file.hashed_bytes for file in derive(resolve(checkpoint.root)).files)
    assert len(pages) * PAGE_SIZE <= tested.wanted_pages <= len(pages) * PAGE_SIZE + headers
    assert tested.wanted <= tested.wanted_pages <= checkpoint.size + 3 * PAGE_SIZE


@pytest.mark.parametrize("name", NAMES)
def test_the_template_is_what_it_reads(checkpoint: Model, name: str) -> None:
    tested = order(checkpoint, name)
    tp = int(tested.options[1]) if "--tp" in tested.options else 1
    rank = 0 if "--rank" in tested.options else None
    template = derive(resolve(checkpoint.root), names=tested.names, tp=tp, rank=rank)
    headers = sum(file.hashed_bytes for file in template.files)
    assert len(template.consumers) == len(tested.ranks)
    if not name.startswith("rank 0"):  # whose slices by columns are read with what lies between
        assert tested.wanted <= template.distinct <= 1.03 * tested.wanted + headers
    assert template.distinct <= checkpoint.size
