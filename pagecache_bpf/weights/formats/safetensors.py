# SPDX-License-Identifier: Apache-2.0
"""Reads headers of safetensors files: 8 bytes of length, then JSON; weights are not looked at.

Source: safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from pagecache_bpf.weights.contents import MAX_TENSORS, Contents, check_extents, damaged
from pagecache_bpf.weights.weight_format import WeightFormat

#: The library's own bound.
MAX_HEADER = 100_000_000
#: Values in a header: the parser needs some 100 bytes for each.
_MAX_VALUES = 8 * MAX_TENSORS
_DTYPE = re.compile(r"(?:BF|[CFIU])(\d+)|BOOL|F8_E\dM\d(?:FNU?Z?)?|F8_E8M0")
_MAX_DIMENSIONS = 32
_NO_SHAPE = "its shape is not a list of sizes"
_NO_OFFSETS = "its data_offsets are not two numbers in order"


def parse(path: Path, fd: int, size: int) -> Contents:
    """Read the header of a safetensors file.

    Args:
        path: the file; for messages only.
        fd: a descriptor of it that is open for reading; its position stays.
        size: bytes of the file.

    Returns:
        The tensors, in the order of the header.

    Raises:
        PagecacheError: the header is damaged.
        OSError: the file cannot be read.

    Source: safetensors, README, "Format".
    """
    import numpy as np

    prefix = os.pread(fd, 8, 0)
    if len(prefix) < 8:
        raise damaged(path, f"it has {size} bytes, less than a safetensors file's first number")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= size - 8:
        raise damaged(path, f"its header would have {length:,} bytes, the file has {size:,}")
    if length > MAX_HEADER:
        raise damaged(path, f"its header would have {length:,} bytes; {MAX_HEADER:,} are allowed")
    header = _json(path, _read(path, fd, length))
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise damaged(path, f"it names more than {MAX_TENSORS:,} tensors")
    base = 8 + length
    names, shapes, itemsize = list(header), [], []
    begins, ends = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    for number, (name, entry) in enumerate(header.items()):
        try:
            begin, end, shape, size_of = _tensor(entry)
        except ValueError as error:
            raise damaged(path, f"tensor {name[:100]!r}: {error}") from None
        if end > size - base:
            raise damaged(path, f"tensor {name[:100]!r} ends behind the file's end")
        begins[number], ends[number] = base + begin, base + end
        shapes.append(shape)
        itemsize.append(size_of)
    lengths = ends - begins
    check_extents(path, names, begins, lengths, base, size)
    return Contents(path, size, "safetensors", names, begins, lengths, 0, base, shapes, itemsize)


def _read(path: Path, fd: int, length: int) -> bytes:
    """Read the JSON of the header, `length` bytes behind its length.  Raises PagecacheError."""
    pieces, at = [], 8
    while at < 8 + length:
        data = os.pread(fd, min(8 + length - at, 1 << 20), at)
        if not data:
            raise damaged(path, "its header ends early")
        pieces.append(data)
        at += len(data)
    return b"".join(pieces)


def _json(path: Path, data: bytes) -> dict[str, Any]:
    # Each value is followed or preceded by one of these, so this bounds what the parser makes.
    """Parse the header's JSON, once it is sure that the result takes bounded memory.

    Raises PagecacheError.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise damaged(path, f"its header has more than {_MAX_VALUES:,} values")
    try:
        header = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError:
        raise damaged(path, "its header is not UTF-8") from None
    except RecursionError:
        raise damaged(path, "its header is nested too deeply") from None
    except ValueError as error:
        raise damaged(path, f"its header is not the JSON of safetensors: {error}") from None
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
    try:
        _refuse_repeated(header)
    except ValueError as error:
        raise damaged(path, f"its header is not the JSON of safetensors: {error}") from None
    return header


class _Repeating(dict[str, Any]):
    """An object of the header in which a name stands twice; repeated: that name."""

    repeated = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; one that repeats a name is an error only where the name matters."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    seen: set[str] = set()
    marked = _Repeating(pairs)
    marked.repeated = next(
        key
        for key, _ in pairs
        if key in seen or seen.add(key)  # type: ignore[func-returns-value]
    )
    return marked


def _refuse_repeated(found: object) -> None:
    """Refuse a name that stands twice, as safetensors 0.8.0 does for tensors and their fields."""
    if isinstance(found, _Repeating):
        raise ValueError(f"it names {found.repeated[:100]!r} twice")


def _constant(text: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's parser takes and JSON does not have."""
    raise ValueError(f"{text} is no JSON")


def _tensor(entry: Any) -> tuple[int, int, tuple[int, ...], int]:
    """Return begin, end, shape and bytes of an element of a tensor's entry.  Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("it is not described by an object")
    _refuse_repeated(entry)
    offsets, shape, dtype = entry.get("data_offsets"), entry.get("shape"), entry.get("dtype")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(_NO_OFFSETS)
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(_NO_OFFSETS)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(_NO_SHAPE)
    for n in shape:
        if type(n) is not int or n < 0:
            raise ValueError(_NO_SHAPE)
    if not isinstance(dtype, str):
        raise ValueError("it has no dtype")
    itemsize = _itemsize(dtype)
    if itemsize and math.prod(shape) * itemsize != end - begin:
        raise ValueError(f"its shape and dtype {dtype[:20]} do not make {end - begin:,} bytes")
    return begin, end, tuple(shape), itemsize


@lru_cache(maxsize=64)
def _itemsize(dtype: str) -> int:
    """Return the bytes of an element; 0 for types that are unknown or smaller than a byte."""
    match = _DTYPE.fullmatch(dtype)
    if not match:
        return 0
    bits = int(match[1]) if match[1] and len(match[1]) < 4 else 8
    return bits // 8 if bits % 8 == 0 else 0


FORMATS = (
    WeightFormat(
        "safetensors",
        ("safetensors",),
        0,
        "safetensors",
        # Behind the length comes an object of JSON.
        resembles=lambda start: start[8:9] == b"{",
        parse=parse,
    ),
)
