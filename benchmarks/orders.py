# SPDX-License-Identifier: Apache-2.0
"""Loaders that read tensors in another order than the file's: what they read, and running them.

Each is a list of pieces (shard, tensor, which part of it), read through safetensors as inference
servers do, in processes of their own, and compared with the files' true bytes afterwards.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from benchmarks import loaders, memory
from benchmarks.cachestat import PAGE_SIZE
from benchmarks.checkpoints import data_offsets
from benchmarks.loaders import Outcome
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.models import Model

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_ROWS = ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_HEADS = ("k_proj", "v_proj")
_COLUMNS = ("o_proj", "down_proj")
_READY_SECONDS = 60.0
_Ranges = tuple[npt.NDArray[np.int64], int]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: share `part` of `parts` along an axis; -1: all of it."""

    path: Path
    name: str
    axis: int = -1
    part: int = 0
    parts: int = 1

    def share(self, shape: Sequence[int]) -> tuple[int, int]:
        """Begin and end along the axis; of what does not divide the last one has less."""
        size = shape[self.axis]
        share = -(-size // self.parts)
        return min(size, self.part * share), min(size, (self.part + 1) * share)


@dataclass(frozen=True)
class Order:
    """What each process of a loader reads, and how `template derive` is told of it."""

    name: str
    ranks: tuple[tuple[Piece, ...], ...]
    names: tuple[str, ...]
    options: tuple[str, ...] = ()

    @cached_property
    def wanted(self) -> int:
        """Bytes that the processes get, those that several of them get counted once."""
        ranges = (byte_range for _, _, ranges in self._by_file() for byte_range in ranges)
        return sum(len(starts) * length for starts, length in ranges)

    @cached_property
    def wanted_pages(self) -> int:
        """Bytes of the pages that hold what the processes get, and the headers.

        A slice of a short row wants a part of every page: no page cache can read less.
        """
        count = 0
        for path, header, ranges in self._by_file():
            marks = np.zeros(path.stat().st_size // PAGE_SIZE + 2, np.int64)
            _mark(marks, np.array([0]), header)
            for starts, length in ranges:
                _mark(marks, starts, length)
            count += int((np.cumsum(marks) > 0).sum())
        return count * PAGE_SIZE

    def _by_file(self) -> Iterator[tuple[Path, int, list[_Ranges]]]:
        """Yield each file, the bytes of its header, and what is read of it; each piece once."""
        pieces: dict[Path, set[Piece]] = {}
        for piece in (piece for rank in self.ranks for piece in rank):
            pieces.setdefault(piece.path, set()).add(piece)
        for path, wanted in pieces.items():
            layout, shapes = data_offsets(path), _shapes(path)
            ranges = [_ranges(piece, *layout[piece.name], shapes[piece.name]) for piece in wanted]
            yield path, min(offset for offset, _ in layout.values()), ranges


def _mark(marks: Any, starts: Any, length: int) -> None:
    """Count in the pages that ranges of a file begin in, and out behind those they end in."""
    np.add.at(marks, starts // PAGE_SIZE, 1)
    np.add.at(marks, (starts + length - 1) // PAGE_SIZE + 1, -1)


def _ranges(piece: Piece, offset: int, length: int, shape: Sequence[int]) -> _Ranges:
    """Return where in its file a piece lies: starts of ranges, and the length of each."""
    if piece.axis < 0:
        return np.array([offset]), length
    begin, end = piece.share(shape)
    rows = shape[0] if piece.axis == 1 else 1
    item = length // rows // shape[piece.axis]
    return offset + begin * item + np.arange(rows) * (length // rows), (end - begin) * item


def _layers(checkpoint: Model) -> dict[int, list[tuple[Path, str]]]:
    """Tensors by their layer; those of none come as -1 (first) and 1 << 30 (last)."""
    found: dict[int, list[tuple[Path, str]]] = {}
    for path in checkpoint.files:
        for name in sorted(data_offsets(path)):
            match = _LAYER.search(name)
            layer = int(match[1]) if match else -1 if "embed" in name else 1 << 30
            found.setdefault(layer, []).append((path, name))
    return found


def make(checkpoint: Model) -> list[Order]:
    """Return the orders of a Llama-shaped, sharded checkpoint."""
    layers = _layers(checkpoint)
    backwards = [piece for layer in sorted(layers, reverse=True) for piece in layers[layer]]
    half = max(1, len(layers) // 2)
    stage = [piece for layer in sorted(layers, reverse=True)[:half] for piece in layers[layer]]
    shards = [[(path, name) for name in sorted(data_offsets(path))] for path in checkpoint.files]
    turns = [
        shard[turn]
        for turn in range(max(map(len, shards)))
        for shard in shards
        if turn < len(shard)
    ]
    every = [piece for shard in shards for piece in shard]
    shapes = {path: _shapes(path) for path in checkpoint.files}

    def whole(pieces: Sequence[tuple[Path, str]]) -> tuple[tuple[Piece, ...], ...]:
        return (tuple(Piece(path, name) for path, name in pieces),)

    def names(pieces: Sequence[tuple[Path, str]]) -> tuple[str, ...]:
        return tuple(name for _, name in pieces)

    def ranks(parts: int, count: int) -> tuple[tuple[Piece, ...], ...]:
        return tuple(
            tuple(_slice(path, name, shapes[path][name], rank, parts) for path, name in every)
            for rank in range(count)
        )

    return [
        Order("reversed layers", whole(backwards), names(backwards)),
        Order("interleaved shards", whole(turns), names(turns)),
        Order("half of the layers, reversed", whole(stage), names(stage)),
        Order("rank 0 of 2", ranks(2, 1), names(every), ("--tp", "2", "--rank", "0")),
        Order("rank 0 of 8", ranks(8, 1), names(every), ("--tp", "8", "--rank", "0")),
        Order("two ranks", ranks(2, 2), names(every), ("--tp", "2")),
    ]


def _slice(path: Path, name: str, shape: Sequence[int], rank: int, parts: int) -> Piece:
    """Return a rank's part of a tensor; all of one that is not shared out.

    Heads and columns are shared out evenly or not at all; of a vocabulary the last rank has less.
    """
    kind = name.rsplit(".", 2)[-2]
    axis = 0 if kind in _ROWS + _HEADS else 1
    if kind not in _ROWS + _HEADS + _COLUMNS or (kind not in _ROWS and shape[axis] % parts):
        return Piece(path, name)
    return Piece(path, name, axis, rank, parts)


def _shapes(path: Path) -> dict[str, list[int]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _index(piece: Piece, shape: Sequence[int]) -> tuple[slice, ...]:
    return (slice(None),) * piece.axis + (slice(*piece.share(shape)),)


def _read(pieces: Sequence[Piece]) -> list[Any]:
    """Read the pieces in their order; every shard stays open once it was opened."""
    opened: dict[Path, Any] = {}
    got = []
    for piece in pieces:
        if piece.path not in opened:
            handle: Any = safe_open(str(piece.path), framework="numpy")
            opened[piece.path] = handle.__enter__()
        file = opened[piece.path]
        if piece.axis < 0:
            got.append(file.get_tensor(piece.name))
            continue
        part = file.get_slice(piece.name)
        got.append(part[_index(piece, part.get_shape())])
    return got


def _right(pieces: Sequence[Piece], got: Sequence[Any], reference: loaders.Reference) -> bool:
    contents = dict(zip(reference.files, reference.contents, strict=True))
    shapes = {path: _shapes(path) for path in {piece.path for piece in pieces}}
    offsets = {path: data_offsets(path) for path in shapes}
    for piece, array in zip(pieces, got, strict=True):
        offset, length = offsets[piece.path][piece.name]
        true = np.frombuffer(contents[piece.path], np.uint16, length // 2, offset)
        true = true.reshape(shapes[piece.path][piece.name])
        if piece.axis >= 0:
            true = true[_index(piece, true.shape)]
        if not np.array_equal(np.ascontiguousarray(array).view(np.uint16), true):
            return False
    return True


def run(
    order: Order,
    reference: loaders.Reference,
    warmer: Callable[[Sequence[Path]], Callable[[], None]] | None = None,
) -> Outcome:
    """Load once: all ranks at once, each in a process of its own.

    Args:
        order: what each rank reads, in its order.
        reference: what the bytes have to be.
        warmer: see loaders.run_loader().

    Returns:
        The time from the first begin to the last end, and what was loaded.

    Raises:
        PagecacheError: a rank failed.
    """
    outcomes: dict[int, Outcome | PagecacheError] = {}
    # Known by now: it looks into the files, which are cold.
    wanted = order.wanted // len(order.ranks)
    # Having memory takes one rank longer than the other, and is not measured.
    ready = multiprocessing.get_context("fork").Barrier(len(order.ranks))

    def rank(number: int) -> None:
        pieces = order.ranks[number]

        def work() -> Outcome:
            memory.reserve(wanted)
            ready.wait(_READY_SECONDS)
            begun = time.monotonic()
            stop = warmer(reference.files) if warmer and number == 0 else None
            got = _read(pieces)
            ended = time.monotonic()
            if stop:
                stop()
            size = sum(array.nbytes for array in got)
            return Outcome(ended - begun, size, _right(pieces, got, reference), begun, ended)

        try:
            outcomes[number] = loaders.in_child(work, f"loading {order.name}")
        except PagecacheError as error:
            outcomes[number] = error

    memory.touch()
    threads = [threading.Thread(target=rank, args=(n,)) for n in range(len(order.ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = []
    for outcome in outcomes.values():
        if isinstance(outcome, PagecacheError):
            raise outcome
        good.append(outcome)
    begun, ended = (
        min(outcome.begun_s for outcome in good),
        max(outcome.ended_s for outcome in good),
    )
    size = sum(outcome.loaded_bytes for outcome in good)
    return Outcome(ended - begun, size, all(outcome.correct for outcome in good), begun, ended)
