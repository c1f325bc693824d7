# SPDX-License-Identifier: Apache-2.0
"""What the tests of ranks share: which elements of a tensor one reads, and files of tensors."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pagecache_bpf.templates.model_config import ModelConfig
from pagecache_bpf.templates.parallel import Parallel
from pagecache_bpf.templates.sharding import Sharding

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1, "F8_E4M3": 1}


def covered(pieces: Any, length: int) -> np.ndarray[Any, Any]:
    """Which bytes of a tensor the pieces have."""
    found = np.zeros(length, bool)
    for offset, size, count, stride in pieces:
        for number in range(count):
            found[offset + number * stride :][:size] = True
    return found


def sharding(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], parallel: Parallel
) -> Sharding:
    return Sharding(ModelConfig(config), parallel, shapes)


def reads(found: Sharding, name: str, rank: int, item: int = 2) -> np.ndarray[Any, Any]:
    """Which elements of a tensor a rank reads, in the tensor's shape."""
    shape = found.shapes[name]
    length = math.prod(shape) * item
    pieces = found.pieces(name, shape, length)[rank]
    ranges = [(piece.offset, piece.length, piece.rows, piece.stride) for piece in pieces]
    bytes_read = covered(ranges, length).reshape(-1, item)
    assert (bytes_read.all(1) == bytes_read.any(1)).all()
    return bytes_read.all(1).reshape(shape)


def write(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], hole: bool) -> int:
    """A safetensors file of these tensors, with bytes or as a hole; its header's length."""
    header: dict[str, object] = {}
    at = 0
    for name, (kind, shape) in tensors.items():
        size = math.prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        if not hole:
            file.seek(8 + len(text))
            file.write(bytes(at))
    return 8 + len(text)
