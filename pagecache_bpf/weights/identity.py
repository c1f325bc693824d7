# SPDX-License-Identifier: Apache-2.0
"""How a weight file is known again: by its size and a digest of its header, not by its path."""

from __future__ import annotations

import os
from dataclasses import dataclass

#: At most so much of a file is hashed to know it again.
MAX_HASHED = 128 << 20
#: Of files whose format is not known, the start and the end are hashed: so much of each.
_EDGE = 64 << 10
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TemplateFile:
    """A file that a template names: its path, and how it is known again wherever it lies.

    Attributes:
        path: below the model's directory.
        size: bytes.
        hashed_from: where the hashed part begins, in bytes: the header of a known format, which
            says what lies where.
        hashed_bytes: bytes of the hashed part; 0: the file's start and end were hashed.
        digest: SHA-256 of that part, in hexadecimal.
    """

    path: str
    size: int
    hashed_from: int
    hashed_bytes: int
    digest: str


def identify(fd: int, size: int, start: int, length: int) -> str:
    """Compute the digest by which a file is known again.

    Args:
        fd: the file, open for reading; its position stays.
        size: bytes of the file.
        start: where the part to be hashed begins, in bytes.
        length: bytes of the part; 0: hash the start and the end of the file, 64 KiB of each.

    Returns:
        The SHA-256 in hexadecimal.

    Raises:
        EOFError: the file ends early.
        OSError: it cannot be read.
    """
    import hashlib  # late: a model is looked for without it

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
