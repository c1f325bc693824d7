# SPDX-License-Identifier: Apache-2.0
"""What the header of a weight file says lies in it, whatever its format.

This module knows no format and opens no file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.weights.identity import TemplateFile

if TYPE_CHECKING:  # importing it takes longer than looking at a model of 1,000 files
    import numpy as np
    import numpy.typing as npt

#: Tensors of one file; the largest models have about 200,000 in all their files.
MAX_TENSORS = 1 << 20
_DOCS = "docs/troubleshooting.md#is-damaged"


@dataclass(frozen=True)
class Contents:
    """What a weight file holds: the names of its tensors, their offsets and lengths in bytes.

    Attributes:
        path: the file; for messages only.
        size: bytes of the file.
        kind: the name of its WeightFormat.
        names: the tensors' names, in the order of the header.
        offsets: where each tensor begins, in bytes from the start of the file; shape (tensors,).
        lengths: bytes of each tensor; shape (tensors,).
        header_from: where the part of the file begins that says all this, in bytes.
        header_bytes: bytes of that part.
        shapes: elements of each tensor by dimension, the slowest first; empty: not known.
        itemsize: bytes of one element of each tensor; 0: not known, or no plain array (quantized).
        digest: the SHA-256 by which the file is known again, in hexadecimal.
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
    digest: str = ""

    def file(self, name: str) -> TemplateFile:
        """Describe the file as a template does.

        Args:
            name: its path below the model's directory.

        Returns:
            Its path, size and digest.
        """
        return TemplateFile(name, self.size, self.header_from, self.header_bytes, self.digest)


def damaged(path: Path, why: str) -> PagecacheError:
    """Make the error for a header that makes no sense.

    Args:
        path: the file.
        why: what is wrong with it, as a sentence without its full stop.

    Returns:
        The error, to be raised.
    """
    return PagecacheError(f"{path} is damaged", why, "Download or copy it again", _DOCS)


def no_template(path: Path, why: str) -> UsageError:
    """Make the error for a file whose header does not say which tensor lies where.

    Args:
        path: the file.
        why: what the file is, as a sentence without its full stop.

    Returns:
        The error, to be raised.
    """
    return UsageError(
        f"no template can be derived from {path}",
        why,
        "Record one: pagecache-bpf template record",
        "docs/troubleshooting.md#no-template-can-be-derived-from",
    )


def check_extents(
    path: Path,
    names: list[str],
    offsets: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    start: int,
    size: int,
) -> None:
    """Check that tensors lie in their part of the file, and not over each other.

    Args:
        path: the file; for messages only.
        names: the tensors' names.
        offsets: where each begins, in bytes; shape (tensors,).
        lengths: bytes of each; shape (tensors,).
        start: where the part begins that holds tensors, in bytes.
        size: where it ends, in bytes.

    Raises:
        PagecacheError: a tensor begins before the part, ends behind it or overlaps another.
    """
    import numpy as np

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
