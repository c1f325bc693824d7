# SPDX-License-Identifier: Apache-2.0
"""The bits that tell which inode numbers tagged files may have."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pagecache_bpf.kernel import abi
from pagecache_bpf.kernel.inode_filter import INODE_WORDS, WORD_BYTES, InodeBits

HEADER = Path(__file__).parents[2] / "bpf" / "include" / "inodes.bpf.h"
ALL = 8 * WORD_BYTES * INODE_WORDS


class Array(dict[int, int]):
    def update(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        self[int.from_bytes(key, sys.byteorder)] = int.from_bytes(value, sys.byteorder)


def key(ino: int, dev_minor: int = 1) -> bytes:
    return bytes(abi.pagecache_file_key(ino=ino, dev_major=8, dev_minor=dev_minor))


def test_the_header_says_the_same() -> None:
    words = re.search(r"#define INODE_WORDS (\d+)", HEADER.read_text())
    assert words is not None
    assert int(words[1]) == INODE_WORDS


def test_a_bit_for_each_number() -> None:
    array = Array()
    bits = InodeBits(array)
    bits.add(key(0))
    bits.add(key(63))
    bits.add(key(64 * 5 + 2))
    assert array == {0: 1 | 1 << 63, 5: 1 << 2}
    bits.remove(key(63))
    assert array == {0: 1, 5: 1 << 2}


def test_numbers_that_share_a_bit() -> None:
    array = Array()
    bits = InodeBits(array)
    bits.add(key(7))
    bits.add(key(7 + ALL))
    bits.add(key(7, dev_minor=2))
    bits.remove(key(7))
    bits.remove(key(7 + ALL))
    assert array == {0: 1 << 7}
    bits.remove(key(7, dev_minor=2))
    assert array == {0: 0}
