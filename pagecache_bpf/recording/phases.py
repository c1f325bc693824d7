# SPDX-License-Identifier: Apache-2.0
"""Phases of a load, marked by the process that loads.

A recording gives its command the path of a datagram socket in the environment.  Without one,
phase() does nothing and costs next to nothing, so it can stay in a server's code.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "PAGECACHE_BPF_PHASES"
MAX_NAME = 100


def phase(name: str) -> None:
    """Mark that a phase of the load begins, for a recording that is being made.

    Args:
        name: what the process is about to do, for example "weights"; a recording keeps the first
            100 characters.

    It never raises: where nobody records, or the recording has ended, nothing happens.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    text = f"{time.monotonic_ns()} {name[:MAX_NAME]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
        mark.setblocking(False)
        mark.sendto(text.encode(errors="replace"), path)


class PhaseListener:
    """Receives the marks of the processes that inherit the environment of a command."""

    def __init__(self, directory: Path) -> None:
        """Listen below a directory.

        Args:
            directory: where the socket is made; it has to be one's own.

        Raises:
            OSError: it cannot be made.
        """
        self._path = directory / "phases.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(self._path))
        self._path.chmod(0o622)

    @property
    def environment(self) -> dict[str, str]:
        """What the command has to find in its environment."""
        return {VARIABLE: str(self._path)}

    def take(self) -> list[tuple[int, str]]:
        """Return the marks that have come: CLOCK_MONOTONIC in nanoseconds, and the name."""
        found: list[tuple[int, str]] = []
        while True:
            try:
                text = self._socket.recv(4 * MAX_NAME + 32).decode(errors="replace")
            except (BlockingIOError, InterruptedError):
                return found
            at, _, name = text.partition(" ")
            if at.isascii() and at.isdigit() and len(at) < 20:
                found.append((int(at), name))

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._socket.close()
        self._path.unlink(missing_ok=True)
