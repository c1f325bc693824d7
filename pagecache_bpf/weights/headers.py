# SPDX-License-Identifier: Apache-2.0
"""Headers of weight files: what lies where, without reading what lies there.

Headers come from anywhere, so nothing in them is believed: every length is compared with the
file before it is used, and what is kept in memory is bounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_key import open_to_read
from pagecache_bpf.weights.contents import Contents, damaged, no_template
from pagecache_bpf.weights.identity import identify
from pagecache_bpf.weights.weight_format import known_formats, recognized


def parse(path: Path) -> Contents:
    """Read the header of a weight file, whichever of the known formats it has.

    Args:
        path: the file; links are followed.

    Returns:
        What lies in it, with the digest by which it is known again.

    Raises:
        UsageError: it cannot be read, or its format is not known.
        PrivilegeError: it may not be read.
        PagecacheError: its header is damaged.
    """
    fd = open_to_read(path)
    try:
        return parse_open(fd, path)
    finally:
        os.close(fd)


def parse_open(fd: int, path: Path) -> Contents:
    """Read the header of an open weight file.

    Args:
        fd: a descriptor that is open for reading; it is not closed, and its position stays.
        path: what the file is called in messages, and in Contents.path.  It is never opened.

    Returns:
        What lies in it, with the digest by which it is known again.

    Raises:
        UsageError: it cannot be read, or its format is not known.
        PagecacheError: its header is damaged.
    """
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, 16, 0)
        found = _parser(path, start)(path, fd, size)
        digest = identify(fd, size, found.header_from, found.header_bytes)
        return replace(found, digest=digest)
    except EOFError:
        raise damaged(path, "it became shorter meanwhile") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory", "", "Name a weight file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read", error.strerror or str(error)) from error


def _parser(path: Path, start: bytes) -> Callable[[Path, int, int], Contents]:
    """Return what reads the header of a file that begins with `start`.  Raises UsageError."""
    found = recognized(path.name, start)
    if found is not None and found.parse is not None:
        return found.parse
    titles = [declared.title for declared in known_formats().values() if declared.parse]
    raise no_template(path, f"it is neither {' nor '.join(titles)}")
