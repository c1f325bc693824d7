# SPDX-License-Identifier: Apache-2.0
"""Headers of weight files: what lies where, without reading what lies there.

Headers come from anywhere, so nothing in them is believed: every length is compared with the
file before it is used, and what is kept in memory is bounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.templates.template import TemplateFile, identify

#: Tensors of one file; the largest models have about 200,000 in all their files.
MAX_TENSORS = 1 << 20
_DOCS = "docs/troubleshooting.md#is-damaged"


@dataclass(frozen=True)
class Contents:
    """What a weight file holds: names, and for each offset in the file and length, in bytes.

    shapes and itemsize (bytes of one element, 0: unknown, or no plain array) tell how a tensor
    can be cut.  [header_from, header_from + header_bytes) is what says all this.
    """

    path: Path
    size: int
    kind: str
    names: list[str]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    header_from: int
    header_bytes: int
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    itemsize: list[int] = field(default_factory=list)

    def file(self, name: str) -> TemplateFile:
        """The file as a template names it."""
        fd = open_to_read(self.path)
        try:
            digest = identify(fd, self.size, self.header_from, self.header_bytes)
        except EOFError:
            raise damaged(self.path, "it became shorter meanwhile") from None
        finally:
            os.close(fd)
        return TemplateFile(name, self.size, self.header_from, self.header_bytes, digest)


def damaged(path: Path, why: str) -> PagecacheError:
    """The error for a header that makes no sense."""
    return PagecacheError(f"{path} is damaged", why, "Download or copy it again", _DOCS)


def open_to_read(path: Path) -> int:
    """Open a file.  Raises UsageError, PrivilegeError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise PrivilegeError(
            f"{path} cannot be opened", "permission denied", "Run as a user who may read the file"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be opened", error.strerror or str(error)) from error


def check_extents(
    path: Path,
    names: list[str],
    offsets: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    start: int,
    size: int,
) -> None:
    """Refuse tensors that lie outside [start, size) or over each other.  Raises PagecacheError."""
    if not len(names):
        return
    bad = (offsets < start) | (lengths < 0) | (offsets > size) | (lengths > size - offsets)
    if bad.any():
        name = names[int(np.flatnonzero(bad)[0])]
        raise damaged(path, f"tensor {name[:100]!r} lies outside of the file")
    order = np.argsort(offsets, kind="stable")
    order = order[lengths[order] > 0]
    ends = offsets[order] + lengths[order]
    over = np.flatnonzero(offsets[order][1:] < ends[:-1])
    if len(over):
        one, other = (names[int(order[over[0] + step])][:100] for step in (0, 1))
        raise damaged(path, f"tensors {one!r} and {other!r} overlap")


def parse(path: Path) -> Contents:
    """Read the header of a weight file, whatever of the known formats it has.

    Raises UsageError (it cannot be read, or no format is known), PagecacheError (damaged).
    """
    from pagecache_bpf.templates import gguf, safetensors, torchzip

    fd = open_to_read(path)
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, 16, 0)
        readers: dict[str, Callable[[Path, int, int], Contents]] = {
            "gguf": gguf.parse,
            "torch": torchzip.parse,
            "safetensors": safetensors.parse,
        }
        return readers[_kind(path, start)](path, fd, size)
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory", "", "Name a weight file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read", error.strerror or str(error)) from error
    finally:
        os.close(fd)


def _kind(path: Path, start: bytes) -> str:
    if start[:4] == b"GGUF":
        return "gguf"
    if start[:4] == b"PK\x03\x04":
        return "torch"
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return "safetensors"
    why = "it is neither safetensors nor GGUF nor a zip checkpoint of PyTorch"
    if start[:1] == b"\x80":
        why = "it is one pickle; only PyTorch's zip format says what lies where"
    raise UsageError(
        f"no template can be derived from {path}",
        why,
        "Record one: pagecache-bpf template record",
        "docs/troubleshooting.md#no-template-can-be-derived-from",
    )
