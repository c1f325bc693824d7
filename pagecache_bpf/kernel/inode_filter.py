# SPDX-License-Identifier: Apache-2.0
"""A Bloom-like filter of the inode numbers of tagged files, in a BPF array.

Programs look at it before they look for the file itself (bpf/include/inodes.bpf.h), so that files
that nobody has tagged cost one bit test.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Protocol

from pagecache_bpf.kernel import abi

INODE_WORDS = 1024
WORD_BYTES = 8
_BITS = 8 * WORD_BYTES


class _Array(Protocol):
    """A map that can be written, as bpf_maps.BpfMap can."""

    def update(self, key: bytes, value: bytes) -> None: ...


class InodeBits:
    """A Bloom-like prefilter with one hash function: the inode number modulo the number of bits.

    A bit that is not set says that a file is not tagged; one that is set says that it may be.
    Files are named by the bytes of their struct pagecache_file_key.  Not thread-safe.

    Args:
        array: the map, of INODE_WORDS words.
    """

    def __init__(self, array: _Array) -> None:
        self._array = array
        self._files: Counter[int] = Counter()  # by bit
        self._words: Counter[int] = Counter()

    def add(self, key: bytes) -> None:
        """Set the bit of a file; it comes before the file's own entry, as programs look here first.

        Args:
            key: what key_of() returned.

        Raises:
            OSError: the kernel refuses to write the map.
        """
        bit = self._bit(key)
        if not self._files[bit]:
            self._flip(bit)
        self._files[bit] += 1

    def remove(self, key: bytes) -> None:
        """Clear the bit of a file that was added, unless another tagged file has the same bit.

        Args:
            key: what key_of() returned.

        Raises:
            OSError: the kernel refuses to write the map.
        """
        bit = self._bit(key)
        self._files[bit] -= 1
        if not self._files[bit]:
            del self._files[bit]
            self._flip(bit)

    def _bit(self, key: bytes) -> int:
        """Return the number of the bit of a file."""
        return int(abi.pagecache_file_key.from_buffer_copy(key).ino) % (INODE_WORDS * _BITS)

    def _flip(self, bit: int) -> None:
        """Turn a bit over and write its word into the map."""
        word = bit // _BITS
        self._words[word] ^= 1 << bit % _BITS
        value = self._words[word].to_bytes(WORD_BYTES, sys.byteorder)
        self._array.update(word.to_bytes(4, sys.byteorder), value)
