# SPDX-License-Identifier: Apache-2.0
"""A file that the observer counts the readers of, and how it is looked at again."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pagecache_bpf.kernel.file_key import reopen
from pagecache_bpf.kernel.file_pages import known_status


@dataclass
class CountedFile:
    """A tagged file; it is opened again to count its resident pages.

    Attributes:
        key: its bytes of struct pagecache_file_key.
        slot: the number by which the programs know it.
        model: name of the model that it belongs to.
        path: leads to it.
        blocks: of page bits that its size takes.
        here: what stat() says of it, device and number: on overlayfs another file than the key's.
        held: a descriptor of it, where opening it by its path would ask a server; -1: none.
        moved: what had been added and removed at the last look.
        looked: when that was, in monotonic seconds.
        size: its bytes; None: its path does not lead to it any more.
        resident_bytes: of it, in the page cache.
    """

    key: bytes
    slot: int
    model: str
    path: str
    blocks: int
    here: tuple[int, int]
    held: int = -1
    moved: bytes | None = None
    looked: float = 0.0
    size: int | None = None
    resident_bytes: int = 0

    def open(self) -> int:
        """Open it for reading; the caller closes the descriptor.

        Returns:
            The descriptor.

        Raises:
            FileNotFoundError: its path leads to another file, as after a copy to overlayfs' upper
                layer, or nowhere.
            OSError: it cannot be opened.
        """
        return os.dup(self.held) if self.held >= 0 else reopen(self.key, self.path)

    def size_now(self) -> int | None:
        """Return its size in bytes; None if its path does not lead to it any more."""
        try:
            if self.held >= 0:
                return known_status(self.held).size
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_size if (status.st_dev, status.st_ino) == self.here else None

    def let_go(self) -> None:
        """Close the descriptor that is kept of it, if there is one."""
        held, self.held = self.held, -1
        if held >= 0:
            os.close(held)
