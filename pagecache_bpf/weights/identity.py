# SPDX-License-Identifier: Apache-2.0
"""How a weight file is known again: by its size and a digest of its header, not by its path."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

#: At most so much of a file is hashed to know it again.
MAX_HASHED = 128 << 20
#: Of files whose format is not known, the start and the end are hashed: so much of each.
_EDGE = 64 << 10
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TemplateFile:
    """A file that a template names: its path below the model's directory, and its identity.

    digest: SHA-256, in hex, of the bytes [hashed_from, hashed_from + hashed_bytes): the
    header of a known format, which says what lies where.
    """

    path: str
    size: int
    hashed_from: int
    hashed_bytes: int
    digest: str


def identify(fd: int, size: int, start: int, length: int) -> str:
    """The digest of a part of an open file; with length 0 of its start and end.

    Raises OSError; EOFError for a file that ends early.
    """
    digest = hashlib.sha256()
    pieces = [(start, length)]
    if not length:
        pieces = [(0, min(size, _EDGE)), (max(_EDGE, size - _EDGE), min(_EDGE, size))]
    for begin, count in pieces:
        end = min(begin + count, size)
        while begin < end:
            data = os.pread(fd, min(_BLOCK, end - begin), begin)
            if not data:
                raise EOFError
            digest.update(data)
            begin += len(data)
    return digest.hexdigest()
