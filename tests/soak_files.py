# SPDX-License-Identifier: Apache-2.0
"""Weight files of the soak whose every byte is known, and readers that check what they are given.

A file's bytes follow from its seed and its size, which stand in its safetensors header: whatever a
path leads to at a moment, what is read of it can be compared.  Run as a reader, in a process that
may be killed: `python -m tests.soak_files HOW PATH...`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

HEADER_BYTES = 4096
PIECE_BYTES = 1 << 18
TENSORS = 8
#: A reader's exit code when bytes are not what was written.
WRONG = 9
_STEP = np.uint64(0x9E3779B97F4A7C15)


def header(seed: int, size: int) -> bytes:
    """Return the first page of a file: a safetensors header, padded with blanks.

    Args:
        seed: number of the file's content.
        size: bytes of the file, the header included.

    Returns:
        HEADER_BYTES bytes.
    """
    bounds = [(size - HEADER_BYTES) * number // TENSORS for number in range(TENSORS + 1)]
    tensors = {
        f"layers.{number}.weight": {
            "dtype": "U8",
            "shape": [end - start],
            "data_offsets": [start, end],
        }
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    }
    text = json.dumps({"__metadata__": {"seed": str(seed), "size": str(size)}, **tensors}).encode()
    length = HEADER_BYTES - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def content(seed: int, size: int, start: int, length: int) -> bytes:
    """Return what a range of a file holds.

    Args:
        seed: number of the file's content.
        size: bytes of the file.
        start: the first byte.
        length: bytes.

    Returns:
        The bytes, fewer at the end of the file.
    """
    end = min(start + length, size)
    first = start // 8
    with np.errstate(over="ignore"):
        words = np.arange(first, (end + 7) // 8, dtype=np.uint64) * _STEP + np.uint64(seed)
    data = bytes(words.tobytes())[start - first * 8 :][: max(0, end - start)]
    if start < HEADER_BYTES:
        data = (header(seed, size)[start:] + data[HEADER_BYTES - start :])[: len(data)]
    return data


def write(path: Path, seed: int, size: int) -> None:
    """Write a file and have it on the disk, so that its pages are clean.

    Args:
        path: the file; what is there is replaced by a rename, as downloads do.
        seed: number of its content.
        size: its bytes.
    """
    fresh = path.with_name(f".{path.name}.part")
    with fresh.open("wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(content(seed, size, start, 1 << 20))
        os.fsync(file.fileno())
    fresh.rename(path)


def drop(path: Path) -> None:
    """Ask for a file's pages to leave the page cache; one that is gone is none.

    Args:
        path: the file.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


class WrongBytesError(Exception):
    """A reader was given bytes that nobody wrote."""


def compare(path: str, fd: int, pieces: Iterator[tuple[int, bytes]]) -> int:
    """Compare pieces of an open file with what was written.

    Args:
        path: for messages.
        fd: the file.
        pieces: where each piece starts, and its bytes; a file that was cut has fewer.

    Returns:
        How many bytes were right.

    Raises:
        WrongBytesError: a byte is another one.
    """
    first = os.pread(fd, HEADER_BYTES, 0)
    if len(first) < HEADER_BYTES:
        return 0  # cut to less than that
    try:
        told = json.loads(first[8:])["__metadata__"]
        seed, size = int(told["seed"]), int(told["size"])
    except (ValueError, KeyError, TypeError):
        raise WrongBytesError(f"{path}: its header is {first[:64]!r}") from None
    right = 0
    for start, data in pieces:
        wanted = content(seed, size, start, len(data))
        if data != wanted:
            differing = next(
                (at for at, (a, b) in enumerate(zip(data, wanted, strict=False)) if a != b),
                len(wanted),
            )
            raise WrongBytesError(f"{path}: byte {start + differing} is wrong (content {seed})")
        right += len(data)
    return right


def _by_read(fd: int) -> Iterator[tuple[int, bytes]]:
    at = 0
    while data := os.pread(fd, PIECE_BYTES // 2, at):
        yield at, data
        at += len(data)


def _by_map(fd: int) -> Iterator[tuple[int, bytes]]:
    size = os.fstat(fd).st_size
    if not size:
        return
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as mapped:
        for at in range(0, size, PIECE_BYTES):
            yield at, mapped[at : at + PIECE_BYTES]


def _by_chance(fd: int) -> Iterator[tuple[int, bytes]]:
    starts = list(range(0, os.fstat(fd).st_size, PIECE_BYTES))
    random.shuffle(starts)
    for at in starts:
        yield at, os.pread(fd, PIECE_BYTES, at)


HOW: dict[str, Callable[[int], Iterator[tuple[int, bytes]]]] = {
    "read": _by_read,
    "map": _by_map,
    "chance": _by_chance,
}


def check(how: str, paths: Sequence[str]) -> int:
    """Read files and compare every byte; one that is gone by now is passed over.

    Args:
        how: a key of HOW.
        paths: the files.

    Returns:
        How many bytes were right.

    Raises:
        WrongBytesError: one was not.
    """
    right = 0
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            right += compare(path, fd, HOW[how](fd))
        finally:
            os.close(fd)
    return right


def main() -> int:
    """Read as the arguments say, and print how many bytes were right."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak_files", description=__doc__)
    parser.add_argument("how", choices=sorted(HOW))
    parser.add_argument("paths", nargs="+")
    parser.add_argument(
        "--cgroup", help="a file cgroup.procs that this process is written to first"
    )
    parser.add_argument("--load", help="a directory that is loaded by load() meanwhile")
    args = parser.parse_args()
    try:
        if args.load is None:
            print(check(args.how, args.paths))
            return 0
        import pagecache_bpf

        with pagecache_bpf.load(args.load) as load:
            load.ready(20)
            right = check(args.how, args.paths)
        print(right, load.report().via)
    except WrongBytesError as error:
        print(error, file=sys.stderr)
        return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
