# SPDX-License-Identifier: Apache-2.0
"""What makes a model the same on two nodes: its content, not its path and not its name.

Of each file: its size, the digest of its header (weights.identity: names, shapes and offsets of
all tensors) and a digest of SAMPLES blocks spread over it.  The header alone would not do: a model
and a fine-tuned one of the same architecture have the same header, byte for byte.  The index of a
sharded model adds nothing: what it chooses are the files, and what it says of them their headers
say, too.  The order of files does not count, as a directory without an index has no other one.

A fine-tuned model of which the samples hit no changed block would be taken for its base; where a
twentieth of the bytes was changed, that happens to one file in 27, and to one model of four such
files in half a million.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.direct_io import open_direct
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.weights import headers
from pagecache_bpf.weights.identity import identify
from pagecache_bpf.weights.models import Model

#: Blocks of BLOCK bytes that are hashed of each file.
SAMPLES = 64
BLOCK = 4096
#: Characters of an identity: 64 bits, so that it fits into the key of a label.
DIGITS = 16

_lock = threading.Lock()
_known: dict[tuple[int, int, int, int], str] = {}


def content_of(model: Model) -> str:
    """Return the content identity of a model: DIGITS hexadecimal digits.

    The headers and SAMPLES blocks of each file are read once while a file stays as it is; blocks
    past the page cache where the file system has direct I/O, so that asking changes no answer.

    Args:
        model: its files have to be readable.

    Returns:
        The identity; two nodes with the same files have the same, wherever the files lie.
    """
    digest = hashlib.sha256()
    for part in sorted(_of_file(path) for path in model.files):
        digest.update(part.encode())
    return digest.hexdigest()[:DIGITS]


def _of_file(path: Path) -> str:
    fd = open_to_read(path)
    try:
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        with _lock:
            found = _known.get(key)
        if found is None:
            found = f"{status.st_size}:{_header(fd, path, status.st_size)}:{_samples(fd)}\n"
            with _lock:
                if len(_known) > 1 << 16:  # files that are long gone
                    _known.clear()
                _known[key] = found
        return found
    finally:
        os.close(fd)


def _header(fd: int, path: Path, size: int) -> str:
    """Return the digest of the header, or of start and end where the format is not known."""
    try:
        return headers.parse_open(fd, path).digest
    except PagecacheError:
        try:
            return identify(fd, size, 0, 0)
        except (OSError, EOFError):
            return ""


def _samples(fd: int) -> str:
    """Return the digest of blocks at multiples of an irrational share of the file."""
    size = os.fstat(fd).st_size
    blocks = max(1, -(-size // BLOCK))
    chosen = sorted(
        {int(blocks * ((number * 0.6180339887498949) % 1.0)) for number in range(SAMPLES)}
    )
    digest = hashlib.sha256()
    direct = None
    with suppress(OSError):  # no direct I/O here
        direct = open_direct(fd)
    try:
        with mmap.mmap(-1, BLOCK) as buffer:
            for block in chosen:
                count = _read(direct if direct is not None else fd, fd, buffer, block * BLOCK)
                digest.update(buffer[:count])
    except OSError:
        return ""
    finally:
        if direct is not None:
            os.close(direct)
    return digest.hexdigest()


def _read(fd: int, plain: int, buffer: mmap.mmap, offset: int) -> int:
    """Read a block; through the page cache where the device wants larger direct reads."""
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError:
        return os.preadv(plain, [buffer], offset)
