# SPDX-License-Identifier: Apache-2.0
"""Phases of a load, marked by the process that loads.

A recording gives its command the path of a datagram socket in the environment; two recordings of
the same load give two, with a colon between.  Without one, phase() does nothing and costs next to
nothing, so it can stay in a server's code.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

VARIABLE = "PAGECACHE_BPF_PHASES"
MAX_NAME = 100
_CREDENTIALS = struct.Struct("3i")  # struct ucred


class Phase(NamedTuple):
    """A phase that begins.

    Attributes:
        time_ns: when; nanoseconds.
        name: what begins.
        tgid: the process that marked it, as the kernel says; 0: not known.
    """

    time_ns: int
    name: str
    tgid: int = 0


def phase(name: str) -> None:
    """Mark that a phase of the load begins, for a recording that is being made.

    Args:
        name: what the process is about to do, for example "weights"; a recording keeps the first
            100 characters.

    It never raises: where nobody records, or the recording has ended, nothing happens.
    """
    paths = os.environ.get(VARIABLE)
    if not paths:
        return
    text = f"{time.monotonic_ns()} {name[:MAX_NAME]}".encode(errors="replace")
    for path in paths.split(os.pathsep):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
            mark.setblocking(False)
            mark.sendto(text, path)


def added_to(environment: Mapping[str, str], path: str) -> str:
    """Return what VARIABLE has to be, so that one more recording is told.

    Args:
        environment: where other recordings may be named already.
        path: the socket of the new one.

    Returns:
        The paths of all sockets, separated as PATH separates directories.
    """
    return os.pathsep.join(filter(None, (environment.get(VARIABLE), path)))


def taken_from(environment: Mapping[str, str], path: str) -> str:
    """Return what VARIABLE has to be without a recording; empty: nobody records.

    Args:
        environment: where it is named, perhaps beside others.
        path: the socket of that recording.

    Returns:
        The paths of the other sockets.
    """
    others = environment.get(VARIABLE, "").split(os.pathsep)
    return os.pathsep.join(other for other in others if other != path)


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
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self._path))
        self._path.chmod(0o622)

    @property
    def environment(self) -> dict[str, str]:
        """What the command has to find in its environment."""
        return {VARIABLE: added_to(os.environ, self.path)}

    @property
    def path(self) -> str:
        """The path of the socket that marks are sent to."""
        return str(self._path)

    def take(self) -> list[Phase]:
        """Take the marks that have come since the last call, without waiting.

        Returns:
            The marks with the process that set each; their times are nanoseconds of
            CLOCK_MONOTONIC. What is no mark is passed over.
        """
        found: list[Phase] = []
        while True:
            try:
                data, extra, _, _ = self._socket.recvmsg(
                    4 * MAX_NAME + 32, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except (BlockingIOError, InterruptedError):
                return found
            at, _, name = data.decode(errors="replace").partition(" ")
            tgid = 0
            for level, kind, value in extra:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    tgid = _CREDENTIALS.unpack(value)[0]
            if at.isascii() and at.isdigit() and len(at) < 20:
                found.append(Phase(int(at), name, tgid))

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._socket.close()
        self._path.unlink(missing_ok=True)
