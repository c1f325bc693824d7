# SPDX-License-Identifier: Apache-2.0
"""Reads a GGUF file as llama.cpp does: its header with read(), its tensors through a mapping.

Here a "tensor" is looked at, not computed with: the sum of its bytes is printed.
"""

import argparse
import mmap
import struct
from typing import BinaryIO

import pagecache_bpf as pc

SIMPLE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32


def number(file: BinaryIO, code: str) -> int:
    """One little-endian number."""
    return int(struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0])


def text(file: BinaryIO) -> str:
    """One string."""
    return file.read(number(file, "Q")).decode()


def value(file: BinaryIO, kind: int) -> bytes:
    """One value of the header, raw; of arrays and strings the end is what matters here."""
    if kind == STRING:
        return text(file).encode()
    if kind == ARRAY:
        inner, count = number(file, "I"), number(file, "Q")
        return b"".join(value(file, inner) for _ in range(count))
    return file.read(SIMPLE[kind])


def header(file: BinaryIO) -> tuple[list[tuple[str, int]], int]:
    """Tensors with their offsets, and where the data begins."""
    if file.read(4) != b"GGUF" or number(file, "I") not in (2, 3):
        raise SystemExit("this is no GGUF file of version 2 or 3")
    tensors, pairs = number(file, "Q"), number(file, "Q")
    alignment = DEFAULT_ALIGNMENT
    for _ in range(pairs):
        key = text(file)
        found = value(file, number(file, "I"))
        if key == "general.alignment":
            alignment = int.from_bytes(found, "little")
    places = []
    for _ in range(tensors):
        name = text(file)
        for _ in range(number(file, "I")):
            number(file, "Q")  # a dimension
        number(file, "I")  # the type
        places.append((name, number(file, "Q")))
    return places, -(-file.tell() // alignment) * alignment


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file")
args = parser.parse_args()

with pc.load(args.file) as load, open(args.file, "rb") as file:
    places, start = header(file)
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        mapping.madvise(mmap.MADV_WILLNEED)  # as llama.cpp does; the kernel cuts it short
        ends = sorted([start + offset for _, offset in places] + [len(mapping)])
        for name, offset in places:
            end = next(position for position in ends if position > start + offset)
            print(name, sum(mapping[start + offset : end]))
print(load.report())
