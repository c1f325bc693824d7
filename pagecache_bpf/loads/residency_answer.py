# SPDX-License-Identifier: Apache-2.0
"""The answer of pagecache_bpf.residency(): how much of some weights is in the page cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Residency:
    """How much of some weights is in the page cache.

    Attributes:
        bytes: size of the files.
        resident_bytes: how much of it is there, in whole pages; None where this user may not know.
        files: the same by file, by real path.
        tensors: the same by tensor, where it was asked for.
        time_ns: when the kernel was asked, in nanoseconds since 1970.
    """

    bytes: int
    resident_bytes: int | None
    files: dict[str, int | None]
    tensors: dict[str, int | None]
    time_ns: int
    _ask: Callable[[], Residency] = field(repr=False, compare=False)

    def again(self) -> Residency:
        """Ask the kernel again about the same files, without looking for them: cheap.

        Returns:
            The answer of this moment.

        Raises:
            UsageError: a file is no longer there.
            PrivilegeError: a file may no longer be opened.
        """
        return self._ask()

    @property
    def fraction(self) -> float | None:
        """Share of the weights that is in the page cache, from 0 to 1; None if it is not told."""
        if self.resident_bytes is None:
            return None
        return self.resident_bytes / self.bytes if self.bytes else 0.0
