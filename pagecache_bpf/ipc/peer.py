# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a Unix socket, and whether that process still lives.

A process id alone proves nothing: the process may have ended and its number may be another's by
now.  So a descriptor of the process (pidfd) is taken when the connection is accepted, and it is
looked at again after each use of the number.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.kernelfs import LIVE

T = TypeVar("T")
_SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h, since 6.5 (commit 7b26952a91cf)


class Peer:
    """The process at the other end of a connection.

    Attributes:
        pid: its number in this PID namespace when it connected; 0 if it has none here.
        uid: its user, as this user namespace numbers users.
        gid: its group.
        privileged: whether it is root of this machine: user 0 in the user namespace and the PID
            namespace of this process.  Root of a container is not.
    """

    def __init__(self, connection: socket.socket, trust_containers: bool = False) -> None:
        """Look at the other end of a connection.

        Args:
            connection: a connected Unix socket.
            trust_containers: take user 0 of any container for root of this machine.

        Raises:
            OSError: the socket is not connected.
        """
        self.pid, self.uid, self.gid = credentials(connection)
        self._pidfd = _pidfd(connection, self.pid, self.uid)
        self.privileged = self.uid == 0 and (trust_containers or self._is_native())

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._pidfd >= 0 and not has_ended(self._pidfd)

    def checked(self, read: Callable[[int], T]) -> T:
        """Do something with the number of the process, and make sure that it was this one's.

        Args:
            read: takes the process id and changes nothing.

        Returns:
            What `read` returned.

        Raises:
            UsageError: the process has ended, so the number may be another's.
        """
        if not self.alive:
            raise self._gone()
        found = read(self.pid)
        if not self.alive:
            raise self._gone()
        return found

    def duplicate(self) -> int:
        """Return another descriptor of the process (a pidfd), which is the caller's.

        Returns:
            The descriptor.

        Raises:
            UsageError: the process has ended.
            OSError: this process has no descriptor left.
        """
        if not self.alive:
            raise self._gone()
        return os.dup(self._pidfd)

    def close(self) -> None:
        """Close the descriptor of the process."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _is_native(self) -> bool:
        """Tell whether its user and PID namespaces are those of this process."""

        def same(pid: int) -> bool:
            return all(
                os.path.samestat(
                    LIVE.stat(f"/proc/{pid}/ns/{kind}"), LIVE.stat(f"/proc/self/ns/{kind}")
                )
                for kind in ("user", "pid")
            )

        with suppress(OSError, UsageError):
            return self.checked(same)
        return False

    @staticmethod
    def _gone() -> UsageError:
        """Make the error for a process that has ended."""
        return UsageError(
            "the request was refused",
            "the process that opened the connection has ended",
            "Open a connection of your own",
        )


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Ask who is at the other end of a Unix socket.

    Args:
        connection: a connected Unix socket.

    Returns:
        Process, user and group as they were when it connected, in the numbers of this process's
        namespaces; process 0 where it has no number here.

    Raises:
        OSError: the socket is no connected Unix socket.

    Source: unix(7), SO_PEERCRED.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def has_ended(pidfd: int) -> bool:
    """Tell whether the process of a descriptor has ended.

    Asked with poll(2), as select(2) takes no descriptor from 1024 on.

    Args:
        pidfd: the process's descriptor.

    Returns:
        True from its end on, also before its parent has waited for it.

    Source: pidfd_open(2), "poll".
    """
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _pidfd(connection: socket.socket, pid: int, uid: int) -> int:
    """Return a descriptor of the process at the other end; -1: it has ended, or none can be had."""
    with suppress(OSError):
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, struct.calcsize("i"))
        (found,) = struct.unpack("i", raw)
        os.set_inheritable(found, False)
        return int(found)
    # Before 6.5 the number may have gone to another process since it connected; one of another
    # user is told by that.
    if pid <= 0:
        return -1
    try:
        found = os.pidfd_open(pid)
    except OSError:
        return -1
    with suppress(OSError, ValueError):
        if uid in _users_of(pid) and not has_ended(found):
            return found
    os.close(found)
    return -1


def _users_of(pid: int) -> set[int]:
    """Return the real, effective, saved and file system user of a process."""
    for line in (LIVE.read(f"/proc/{pid}/status") or "").splitlines():
        if line.startswith("Uid:"):
            return set(map(int, line.split()[1:]))
    return set()
