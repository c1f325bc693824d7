# SPDX-License-Identifier: Apache-2.0
"""Which inode numbers tagged files may have: the bits of bpf/include/inodes.bpf.h."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Protocol

from pagecache_bpf.kernel import abi

INODE_WORDS = 1024
WORD_BYTES = 8
_BITS = 8 * WORD_BYTES


class _Array(Protocol):
    def update(self, key: bytes, value: bytes) -> None: ...


class InodeBits:
    """One bit for all files whose inode numbers are the same modulo their number.

    Files are named by their pagecache_file_key.  Not thread-safe.  Raises OSError.
    """

    def __init__(self, array: _Array) -> None:
        self._array = array
        self._files: Counter[int] = Counter()  # by bit
        self._words: Counter[int] = Counter()

    def add(self, key: bytes) -> None:
        """Set the bit of a file; it comes before the file's own entry, as programs ask here first.

        Args:
            key: what key_of() returned.
        """
        bit = self._bit(key)
        if not self._files[bit]:
            self._flip(bit)
        self._files[bit] += 1

    def remove(self, key: bytes) -> None:
        """Clear the bit of a file that was added, unless another file shares it.

        Args:
            key: what key_of() returned.
        """
        bit = self._bit(key)
        self._files[bit] -= 1
        if not self._files[bit]:
            del self._files[bit]
            self._flip(bit)

    def _bit(self, key: bytes) -> int:
        return int(abi.pagecache_file_key.from_buffer_copy(key).ino) % (INODE_WORDS * _BITS)

    def _flip(self, bit: int) -> None:
        word = bit // _BITS
        self._words[word] ^= 1 << bit % _BITS
        value = self._words[word].to_bytes(WORD_BYTES, sys.byteorder)
        self._array.update(word.to_bytes(4, sys.byteorder), value)
