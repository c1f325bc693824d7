# SPDX-License-Identifier: Apache-2.0
"""Reads headers of GGUF files, versions 2 and 3; weights are not looked at.

Source: ggml, docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.weights.contents import MAX_TENSORS, Contents, check_extents, damaged
from pagecache_bpf.weights.weight_format import WeightFormat

if TYPE_CHECKING:
    import numpy as np

#: Tokenizers make headers of a few MiB; nothing real comes near this.
MAX_HEADER = 128 << 20
_MAX_NAME = 64 << 10
_MAX_KEYS = 1 << 16
_BLOCK = 1 << 18
_STRING, _ARRAY = 8, 9
_UINT32 = 4
#: Arrays in arrays in arrays: far more than anything has.
_MAX_DEPTH = 8
#: Bytes of a value, by its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
#: (elements, bytes) of a block, by ggml type; of types not in here the size follows from where
#: the next tensor begins.
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)},
    **{9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176)},
    **{14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98)},
    **{19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2)},
    **{34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18)},
}
_PLAIN = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}


class _Short(Exception):
    """The header goes on behind the end of the file, or of what is allowed."""


class _Cursor:
    """Reads numbers and strings of a header one after the other; the file is read in blocks.

    Raises _Short where the header would go on behind the end of the file or MAX_HEADER.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._limit = fd, min(size, MAX_HEADER)
        self.big_endian = False
        self._start, self._data = 0, b""
        self.at = 0

    def take(self, count: int) -> bytes:
        """Read bytes.

        Args:
            count: how many.

        Returns:
            The next `count` bytes.
        """
        if count > self._limit - self.at:
            raise _Short
        begin = self.at - self._start
        if begin < 0 or begin + count > len(self._data):
            self._data = os.pread(self._fd, max(count, _BLOCK), self.at)
            self._start, begin = self.at, 0
            if len(self._data) < count:
                raise _Short
        self.at += count
        return self._data[begin : begin + count]

    def skip(self, count: int) -> None:
        """Pass over bytes without reading them."""
        if count > self._limit - self.at:
            raise _Short
        self.at += count

    def number(self, size: int) -> int:
        """Read an unsigned number in the file's byte order, of `size` bytes."""
        return int.from_bytes(self.take(size), "big" if self.big_endian else "little")

    def pass_string(self) -> None:
        """Pass over a string, which its length stands in front of."""
        self.skip(self.number(8))


def parse(path: Path, fd: int, size: int) -> Contents:
    """Read the header of a GGUF file.

    Args:
        path: the file; for messages only.
        fd: a descriptor of it that is open for reading; its position stays.
        size: bytes of the file.

    Returns:
        The tensors; of types that ggml does not pack in blocks of known size, the length is that up
        to the next tensor.

    Raises:
        PagecacheError: the header is damaged, or of another version than 2 and 3.
        OSError: the file cannot be read.

    Source: ggml, docs/gguf.md.
    """
    try:
        return _parse(path, _Cursor(fd, size), size)
    except _Short:
        bound = f" or {MAX_HEADER >> 20} MiB" if size > MAX_HEADER else ""
        raise damaged(path, f"its header goes on behind the file's end{bound}") from None


def _parse(path: Path, at: _Cursor, size: int) -> Contents:
    """Read the keys, of which only general.alignment matters, and then the tensors."""
    at.skip(4)
    raw = at.take(4)
    version = int.from_bytes(raw, "little")
    if version not in (2, 3) and int.from_bytes(raw, "big") in (2, 3):
        at.big_endian, version = True, int.from_bytes(raw, "big")
    if version not in (2, 3):
        raise damaged(path, f"it has version {version} of GGUF; 2 and 3 are known")
    tensors, keys = at.number(8), at.number(8)
    if tensors > MAX_TENSORS or keys > _MAX_KEYS:
        raise damaged(path, f"it would have {tensors:,} tensors and {keys:,} keys")
    alignment = 32
    for _ in range(keys):
        name = _name(path, at)
        kind = at.number(4)
        if name == "general.alignment" and kind == _UINT32:
            alignment = at.number(4)
            if alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
                raise damaged(path, f"its alignment would be {alignment:,}")
        else:
            _pass_value(path, at, kind)
    return _tensors(path, at, size, tensors, alignment)


def _name(path: Path, at: _Cursor) -> str:
    """Read a name.  Raises PagecacheError if it is too long or not UTF-8."""
    length = at.number(8)
    if length > _MAX_NAME:
        raise damaged(path, f"a name would have {length:,} bytes")
    try:
        return at.take(length).decode()
    except UnicodeDecodeError:
        raise damaged(path, "a name is not UTF-8") from None


def _pass_value(path: Path, at: _Cursor, kind: int, depth: int = 0) -> None:
    """Pass over a value of a key; arrays may hold arrays."""
    if kind == _STRING:
        at.pass_string()
    elif kind == _ARRAY:
        kind, count = at.number(4), at.number(8)
        if kind == _STRING:
            for _ in range(count):
                at.pass_string()
        elif kind in _SIZES:
            at.skip(count * _SIZES[kind])
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            for _ in range(count):
                _pass_value(path, at, _ARRAY, depth + 1)
        else:
            raise damaged(path, f"it has an array of type {kind}")
    elif kind in _SIZES:
        at.skip(_SIZES[kind])
    else:
        raise damaged(path, f"it has a value of type {kind}")


def _tensors(path: Path, at: _Cursor, size: int, count: int, alignment: int) -> Contents:
    """Read the descriptions of `count` tensors.  Raises PagecacheError."""
    import numpy as np

    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    types: list[int] = []
    offsets: list[int] = []
    for _ in range(count):
        names.append(_name(path, at))
        dimensions = at.number(4)
        if dimensions > 8:
            raise damaged(path, f"tensor {names[-1][:100]!r} would have {dimensions} dimensions")
        raw = at.take(8 * dimensions)
        # ggml names the fastest dimension first.
        order = ">" if at.big_endian else "<"
        shapes.append(struct.unpack(f"{order}{dimensions}Q", raw)[::-1])
        types.append(at.number(4))
        offsets.append(at.number(8))
    if len(set(names)) != len(names):
        raise damaged(path, "it names a tensor twice")
    header = at.at
    base = -(-header // alignment) * alignment
    if any(offset > size - base for offset in offsets):
        raise damaged(path, "a tensor begins behind the file's end")
    starts = np.array(offsets, np.int64) + base
    lengths = _lengths(path, names, shapes, types, starts, size)
    check_extents(path, names, starts, lengths, base, size)
    itemsize = [_PLAIN.get(kind, 0) for kind in types]
    return Contents(path, size, "gguf", names, starts, lengths, 0, header, shapes, itemsize)


def _lengths(
    path: Path,
    names: list[str],
    shapes: list[tuple[int, ...]],
    types: list[int],
    starts: np.typing.NDArray[np.int64],
    size: int,
) -> np.typing.NDArray[np.int64]:
    """Compute the bytes of each tensor by its type and shape, or by where the next one begins."""
    import numpy as np

    ordered = np.sort(starts)
    following = np.append(ordered, size)[np.searchsorted(ordered, starts, side="right")]
    lengths = np.zeros(len(names), np.int64)
    for number, (shape, kind) in enumerate(zip(shapes, types, strict=True)):
        elements = 1
        for n in shape:
            elements = min(elements * n, 1 << 64) if elements else 0
        block = _BLOCKS.get(kind)
        length = int(following[number] - starts[number])
        if block:
            length = -(-elements // block[0]) * block[1]
        if length > size:
            raise _outside(path, names[number])
        lengths[number] = length
    return lengths


def _outside(path: Path, name: str) -> PagecacheError:
    """Make the error for a tensor that ends behind the end of the file."""
    return damaged(path, f"tensor {name[:100]!r} ends behind the file's end")


FORMATS = (WeightFormat("gguf", ("gguf", "ggml"), 20, "GGUF", magic=b"GGUF", parse=parse),)
