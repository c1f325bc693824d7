# SPDX-License-Identifier: Apache-2.0
"""What connections of the public socket have, and how many descriptors that may be.

The controller's limit of open files is shared out, as whoever runs out of them can serve nobody:
three in ten are for connections, one in eight for descriptors that are on their way, three in
eight for files, and the rest is the controller's own.  Of its share a user gets no more than what
is still free afterwards, so that a newcomer finds something however many others take what they can.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pagecache_bpf.controller.client_files import ClientFile
from pagecache_bpf.controller.inspectors import Owner
from pagecache_bpf.controller.load_ledger import ClientLoad
from pagecache_bpf.errors import UsageError
from pagecache_bpf.ipc import public_protocol
from pagecache_bpf.ipc.server import Connection, close_all

#: Files of one user that wait for a load or are in one.
FILES_PER_USER = 16384
#: Open loads of one user.
LOADS_PER_USER = 256
#: Connections of all users: each has a socket and two descriptors of its process.
CONNECTIONS = 2048
#: Descriptors for a file while its load is opened: the client's, the load's, and its tag's.
_WAITING, _LOADED = 3, 2


@dataclass
class ClientSession:
    """What a connection has: files that wait for open_load, and loads."""

    files: list[tuple[int, ClientFile]] = field(default_factory=list)
    loads: dict[str, ClientLoad] = field(default_factory=dict)
    watched: bool = False
    gone: bool = False


@dataclass(eq=False)
class WaitingLoad:
    """An open_load that is judged, waits for room in the budget, or is being placed.

    files: taken from its session.  fds: the template that came along.  over: its connection is,
    and the descriptors are closed.
    """

    connection: Connection
    arguments: dict[str, Any]
    files: list[tuple[int, ClientFile]]
    fds: list[int]
    until: float
    over: bool = False

    def close(self) -> None:
        """Let go of its descriptors."""
        close_all([fd for fd, _ in self.files] + self.fds)


def connections_for(limit: int) -> int:
    """Return how many connections all users together may have.

    Args:
        limit: the controller's limit of open files.
    """
    return min(CONNECTIONS, limit // 10)


def check_loads(
    connection: Connection, sessions: Iterable[tuple[Connection, ClientSession]]
) -> None:
    """Make sure that a user may open one more load.

    Args:
        connection: who asks; root of this machine may open any number.
        sessions: of all connections.

    Raises:
        UsageError: the user has too many.
    """
    mine = sum(len(session.loads) for other, session in sessions if other.owner == connection.owner)
    if mine >= LOADS_PER_USER and not connection.privileged:
        raise UsageError(
            "the load was not opened",
            f"this user has {mine} open loads",
            "Close loads that are over",
        )


def check_room(
    owner: Owner,
    more: int,
    sessions: Iterable[tuple[Connection, ClientSession]],
    pending: Iterable[WaitingLoad],
    limit: int | None = None,
) -> None:
    """Make sure that a user may pass more files.

    Args:
        owner: the user; root of this machine is bounded in the number of its files only.
        more: how many come.
        sessions: of all connections.
        pending: every load that is not open yet, of all connections.
        limit: the controller's limit of open files; None: what it is.

    Raises:
        UsageError: they are too many.
    """
    what = "the files were refused"
    if limit is None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = mine = everybodys = 0

    def count(whose: Owner, waiting: int, loaded: int) -> None:
        nonlocal files, mine, everybodys
        needed = _WAITING * waiting + _LOADED * loaded
        everybodys += needed
        if whose == owner:
            files += waiting + loaded
            mine += needed

    for connection, session in sessions:
        loaded = sum(len(load.held) for load in session.loads.values())
        count(connection.owner, len(session.files), loaded)
    for load in pending:
        count(load.connection.owner, len(load.files), 0)
    if files + more > FILES_PER_USER:
        raise UsageError(what, f"{files} of this user are in use or wait for a load already")
    _, privileged = owner
    free = limit * 3 // 8 - everybodys - _WAITING * more
    if not privileged and mine + _WAITING * more > max(
        free, _WAITING * public_protocol.FDS_PER_MESSAGE
    ):
        raise UsageError(
            what,
            f"{files} of this user are in use or wait for a load already, and those of all users "
            f"need {everybodys} of the {limit} descriptors that the controller may have",
            "Raise the controller's limit of open files (LimitNOFILE)",
        )
