# SPDX-License-Identifier: Apache-2.0
"""Which files of a client the controller tells the residency of, and drops pages of.

The kernel tells what of a file is in the page cache only to its owner and to whoever may write it
(CVE-2019-5489): what other users' programs read can be seen by it.  The controller goes further
for weights only, and only where `socket.residency` does not forbid it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from pagecache_bpf.controller.client_files import (
    ClientFile,
    MountTable,
    mounts_for,
)
from pagecache_bpf.controller.load_ledger import LoadLedger
from pagecache_bpf.controller.resolved_config import ResolvedConfig
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.ipc.server import Connection
from pagecache_bpf.weights.weight_format import format_of


class CacheRights:
    """Judges files that clients pass."""

    def __init__(self, ledger: LoadLedger, settings: Callable[[], ResolvedConfig]) -> None:
        """Judge by a configuration.

        Args:
            ledger: knows what root has tagged.
            settings: returns the configuration as it is now.
        """
        self._ledger, self._settings = ledger, settings

    def check(self, connection: Connection, fd: int, file: ClientFile) -> None:
        """Raise PrivilegeError unless a client may know what of a file is in the page cache.

        Args:
            connection: the client's.
            fd: the descriptor that it has passed.
            file: what that proves.

        Raises:
            PrivilegeError: it may not.
            UsageError: the client has ended.
        """
        if self.told(connection, [(fd, file)]):
            return
        kinds = "weights" if self._weights_are_told() else "a model of root's"
        raise PrivilegeError(
            "the page cache of the file is not told",
            f"{file.path} is neither yours nor {kinds}, and the kernel tells it only to the "
            "owner and to whoever may write the file",
            "Ask as the owner of the file, or have it named in the controller's configuration",
        )

    def told(self, connection: Connection, files: Sequence[tuple[int, ClientFile]]) -> bool:
        """Return whether a client may know what of all these files is in the page cache.

        Args:
            connection: the client's.
            files: descriptors that it has passed, and what they prove.

        Raises:
            UsageError: the client has ended.
        """
        mounts = mounts_for(connection)
        if mounts is None:  # root
            return True
        others = [(fd, file) for fd, file in files if not _is_own(fd, connection.owner[0])]
        tagged = self._ledger.tagged_by_root([file for _, file in others]) if others else set()
        model_of = self._settings().model_of
        others = [
            (fd, file)
            for fd, file in others
            if file.key not in tagged and model_of([file.key]) is None
        ]
        if self._weights_are_told():
            others = [(fd, file) for fd, file in others if not _is_called_weights(fd, file, mounts)]
            return not others or self._have_headers([fd for fd, _ in others], connection)
        return not others

    def _weights_are_told(self) -> bool:
        return self._settings().config.residency == "weights"

    def _have_headers(self, fds: Sequence[int], connection: Connection) -> bool:
        """Tell whether files begin as weight files do, as read by the client's inspector."""
        with suppress(PagecacheError):
            self._ledger.inspectors.run(
                connection.owner,
                connection.peer.gid,
                "recognize",
                fds,
                lambda: connection.alive,
            )
            return True
        return False


def _is_own(fd: int, uid: int) -> bool:
    """Tell whether the kernel itself would tell this user: an owner, or who may write the file."""
    writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    return writable or os.fstat(fd).st_uid == uid


def _is_called_weights(fd: int, file: ClientFile, mounts: MountTable) -> bool:
    """Tell whether the file's only name is that of a weight file, and not of the user's making.

    A user can give any file a name by a bind mount in a namespace, or by a hard link where
    fs.protected_hardlinks is 0.
    """
    return (
        mounts.is_here(fd)
        and os.fstat(fd).st_nlink == 1
        and format_of(file.path.rpartition("/")[2]) is not None
    )
