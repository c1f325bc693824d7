# SPDX-License-Identifier: Apache-2.0
"""Weight files of known contents for tests, written by hand where nothing else is said."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def safetensors(
    path: Path, tensors: Mapping[str, tuple[int, ...]], metadata: bool = True
) -> dict[str, tuple[int, int]]:
    """Write F16 tensors of these shapes in this order; where each lies: (offset, length)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if metadata else {}
    at, places = 0, {}
    for name, shape in tensors.items():
        length = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + length]}
        places[name] = (at, length)
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = np.arange(at, dtype=np.uint32).astype(np.uint8).tobytes()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    base = 8 + len(text)
    return {name: (base + start, length) for name, (start, length) in places.items()}


def noise(path: Path, sizes: Sequence[int], seed: int) -> Path:
    """Have the package safetensors write tensors of so many random bytes, in this order."""
    random = np.random.default_rng(seed)
    tensors = {
        f"layer.{number:03}": random.integers(0, 256, size, np.uint8)
        for number, size in enumerate(sizes)
    }
    save_file(tensors, path)
    return path


def raw_safetensors(path: Path, header: bytes, length: int | None = None, data: int = 64) -> Path:
    """Write a header as it is, with a length of its own if wanted."""
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + bytes(data))
    return path


def string(text: str, order: str = "<") -> bytes:
    """A string of GGUF."""
    data = text.encode()
    return struct.pack(f"{order}Q", len(data)) + data


def gguf(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]],
    *,
    version: int = 3,
    alignment: int | None = None,
    order: str = "<",
    data: int = 4096,
) -> int:
    """Write a GGUF file of tensors (name, dimensions, type, offset); where the data begins."""
    keys = [
        string("general.name", order) + struct.pack(f"{order}I", 8) + string("a model", order),
        string("tokens", order)
        + struct.pack(f"{order}IIQ", 9, 8, 3)
        + b"".join(string(t, order) for t in "abc"),
        string("scores", order) + struct.pack(f"{order}IIQ2f", 9, 6, 2, 1.0, 2.0),
        string("flag", order) + struct.pack(f"{order}I?", 7, True),
    ]
    if alignment:
        keys.append(string("general.alignment", order) + struct.pack(f"{order}II", 4, alignment))
    text = b"GGUF" + struct.pack(f"{order}IQQ", version, len(tensors), len(keys)) + b"".join(keys)
    for name, dimensions, kind, offset in tensors:
        text += string(name, order) + struct.pack(f"{order}I", len(dimensions))
        text += struct.pack(f"{order}{len(dimensions)}Q", *dimensions)
        text += struct.pack(f"{order}IQ", kind, offset)
    step = alignment or 32
    base = -(-len(text) // step) * step
    path.write_bytes(text.ljust(base, b"\0") + bytes(data))
    return base


def read_without_readahead(path: Path, offset: int, length: int) -> None:
    """Read a range without readahead."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, length, offset)
    os.close(fd)


def hole_of_strings(path: Path, strings: int) -> Path:
    """Make a GGUF file whose metadata are an array of empty strings in a hole: no bytes on disk."""
    with path.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
        out.write(struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, strings))
        out.truncate(out.tell() + 8 * strings + (1 << 20))
    return path
