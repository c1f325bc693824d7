# SPDX-License-Identifier: Apache-2.0
"""The processes of ours whose reads are no accesses, in a map that programs look into."""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol


class _Map(Protocol):
    """Such a map, whoever loaded it."""

    def update(self, key: bytes, value: bytes) -> Any:
        """Set a value.  Raises OSError."""

    def delete(self, key: bytes) -> bool:
        """Forget a key; False if it was not there.  Raises OSError."""


class OwnProcesses:
    """Keeps a map of process numbers; those that ended go, since numbers are used again."""

    def __init__(self, processes: _Map) -> None:
        self._map = processes
        self._pids: set[int] = set()

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

    def prune(self) -> None:
        """Forget the ones that have ended."""
        for pid in list(self._pids):
            if not os.path.exists(f"/proc/{pid}"):
                self._map.delete(pid.to_bytes(4, sys.byteorder))
                self._pids.discard(pid)
