# SPDX-License-Identifier: Apache-2.0
"""Files that clients pass: what a descriptor proves, and on whose file system the file is."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pagecache_bpf.errors import PrivilegeError, UsageError
from pagecache_bpf.ipc.public_protocol import TEMPLATE_BYTES
from pagecache_bpf.ipc.server import Connection
from pagecache_bpf.kernel import file_identity
from pagecache_bpf.kernel.file_key import key_of, path_of
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE

#: What users can mount by themselves, and make hang: FUSE, and overlayfs on top of it.
_USERS_OWN = ("fuse", "overlay")


@dataclass(frozen=True)
class ClientFile:
    """A file that somebody has proved to be allowed to read.

    key: device, inode and generation.  path: by the kernel's word, and for people only: where it
    leads now may be another file.  size: bytes, when the descriptor came.
    """

    key: bytes
    path: str
    size: int


class MountTable:
    """The mounts of this process and of a client's, to tell whose file system a file is on.

    Args:
        pid: the client's process, as this process's /proc has it; 0: only this process's mounts.
    """

    def __init__(self, pid: int) -> None:
        self._here = _mountinfo("/proc/self/mountinfo")
        self._there = {} if pid <= 0 else _mountinfo(f"/proc/{pid}/mountinfo")
        self._devices = {device: kind for device, kind in self._here.values() if kind}

    def trusted(self, fd: int) -> bool:
        """Tell whether system calls on a file cannot be made to wait by a user's own server.

        This asks nothing of the file system itself.  What the kernel says of who has mounted it
        holds in every mount namespace, as a container's, and without a look into the client's;
        FUSE is mounted for users by a program of root's, so that the mounts have to tell of whom.

        Args:
            fd: the file.

        Returns:
            Whether its file system is mounted by root.
        """
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            return True  # a memfd: no mount has it
        mount = file_identity.mount_of(fd)
        if mount is not None and mount.by_root and mount.magic != file_identity.FUSE:
            return True
        number = _mount_of(fd)
        device, kind = self._here.get(number) or self._there.get(number) or ("", "")
        if kind and not kind.startswith(_USERS_OWN):
            return True
        # Users' own mount namespaces are never seen from here, those of containers are.
        return self._devices.get(device, "") != "" and bool(kind)

    def is_here(self, fd: int) -> bool:
        """Return whether a file was opened below a mount of this process's: root has made that.

        Args:
            fd: the open file.
        """
        return _mount_of(fd) in self._here


def mounts_for(connection: Connection) -> MountTable | None:
    """Return the mounts of a client, as check_descriptor() takes them; None for root's.

    Args:
        connection: the client's.

    Raises:
        UsageError: its process has ended.
    """
    return None if connection.privileged else connection.peer.checked(MountTable)


def _mount_of(fd: int) -> str:
    """Return the id of the mount through which a file was opened; empty if it is not told."""
    for line in (LIVE.read(f"/proc/self/fdinfo/{fd}") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "mnt_id":
            return value.strip()
    return ""


def _mountinfo(path: str) -> dict[str, tuple[str, str]]:
    """Device and type of each mount by its number; no type for a FUSE mount of a user."""
    found = {}
    for line in (LIVE.read(path) or "").splitlines():
        head, _, tail = line.partition(" - ")
        number, _, device, *_ = head.split()
        kind, *rest = tail.split()
        if kind.startswith("fuse") and "user_id=0" not in (rest[-1] if rest else "").split(","):
            kind = ""
        found[number] = (device, kind)
    return found


def check_descriptor(fd: int, mounts: MountTable | None) -> ClientFile:
    """Find out what a descriptor proves.

    What may be asked without a file system comes first.

    Args:
        fd: the descriptor of a stranger's.
        mounts: of the client; None for one that is trusted, root.

    Returns:
        The file.

    Raises:
        PrivilegeError: it is not open for reading.
        UsageError: it is no regular file, or on a file system of the user's own.
    """
    what = "the descriptor was refused"
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise PrivilegeError(
            what, "it is an O_PATH one, which proves no right", "Open the file for reading"
        )
    if flags & os.O_ACCMODE not in (os.O_RDONLY, os.O_RDWR):
        raise PrivilegeError(what, "it is not open for reading", "Open the file for reading")
    if mounts is not None and not mounts.trusted(fd):
        raise UsageError(
            what,
            "it is on a file system that a user has mounted, or that cannot be seen from here",
            "Put the model on a file system that root has mounted",
        )
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(what, "it is not of a regular file", "Pass the file with the weights")
    path = path_of(fd)
    return ClientFile(key_of(fd), path, status.st_size)


def page_range(file: ClientFile, offset: int, length: int) -> tuple[int, int]:
    """Cut a range of a file at its end.

    Args:
        file: a file that a client has passed.
        offset: where the range begins, in bytes.
        length: its bytes; 0: up to the end.

    Returns:
        Where it begins and ends.

    Raises:
        UsageError: no page begins there.
    """
    if offset % PAGE_SIZE:
        raise UsageError("the range was refused", f"{offset} is not a multiple of {PAGE_SIZE}")
    stop = offset + length if length else file.size
    return min(offset, file.size), min(stop, file.size)


def template_of(fds: Sequence[int], mounts: MountTable | None) -> int | None:
    """Return the descriptor of a template that came along; None: there is none.

    Args:
        fds: what came with the request.
        mounts: as check_descriptor() takes them.

    Raises:
        PrivilegeError: it proves no right.
        UsageError: it is too large, or no file that can be read.
    """
    if not fds:
        return None
    file = check_descriptor(fds[0], mounts)
    if file.size > TEMPLATE_BYTES:
        raise UsageError(
            "the template was refused",
            f"it has {file.size} bytes, at most {TEMPLATE_BYTES} are taken",
        )
    return fds[0]
