# SPDX-License-Identifier: Apache-2.0
"""Keeps the numbers of our own processes in a map that BPF programs look into.

Programs do not count as an access what these processes read: it is our prefetching, not the reader
that a policy serves.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

from pagecache_bpf.kernel.process_tree import is_alive


class _Map(Protocol):
    """The map of process numbers, whoever has loaded it."""

    def update(self, key: bytes, value: bytes) -> Any:
        """Set the value of a key.  Raises OSError."""

    def delete(self, key: bytes) -> bool:
        """Remove a key; False if it was not there.  Raises OSError."""


class OwnProcesses:
    """A map of process numbers; those that ended are removed, since the kernel uses numbers again.

    Args:
        processes: the map, from a process number (4 bytes) to a value that is not used.
        changes: a map whose element 0 (8 bytes) is how often `processes` has changed, for programs
            that keep what they found in it; None: there are no such programs.
    """

    def __init__(self, processes: _Map, changes: _Map | None = None) -> None:
        self._map = processes
        self._pids: set[int] = set()
        self._changes = changes
        self._changed = 0
        self._tell()

    def add(self, pid: int) -> None:
        """Tell the programs that a process is ours, so that what it reads counts as no access.

        Args:
            pid: the process.

        Raises:
            OSError: the map is full.
        """
        self.prune()
        self._map.update(pid.to_bytes(4, sys.byteorder), bytes(4))
        self._pids.add(pid)
        self._tell()

    def prune(self) -> None:
        """Remove the processes that have ended.

        Raises:
            OSError: the kernel refuses to write the map.
        """
        for pid in list(self._pids):
            if not is_alive(pid):
                self._map.delete(pid.to_bytes(4, sys.byteorder))
                self._pids.discard(pid)
                self._tell()

    def _tell(self) -> None:
        """Have programs look into the map again; after each change, and once before any program."""
        self._changed += 1
        if self._changes is not None:
            self._changes.update(bytes(4), self._changed.to_bytes(8, sys.byteorder))
