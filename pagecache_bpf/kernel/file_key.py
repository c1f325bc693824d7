# SPDX-License-Identifier: Apache-2.0
"""What identifies a file to the kernel's events, and how a file is opened again by it."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from pagecache_bpf.errors import PrivilegeError, UsageError

_FS_IOC_GETVERSION = 0x80087601  # _IOR('v', 1, long)


def key_of(fd: int) -> bytes:
    """Return how the BPF programs know a file: by device, inode number and generation.

    Args:
        fd: the file's descriptor.

    Returns:
        The bytes of struct pagecache_file_key.

    Raises:
        OSError: the descriptor is none.
    """
    from pagecache_bpf.kernel import abi  # late: files are read without it, and it takes a while

    status = os.fstat(fd)
    return bytes(
        abi.pagecache_file_key(
            ino=status.st_ino,
            dev_major=os.major(status.st_dev),
            dev_minor=os.minor(status.st_dev),
            generation=generation_of(fd),
        )
    )


def generation_of(fd: int) -> int:
    """Return the generation of an inode, which tells it from others that had its number.

    Args:
        fd: the file's descriptor.

    Returns:
        The generation; 0 where the file system does not tell it.
    """
    version = array.array("L", [0])
    with suppress(OSError):
        fcntl.ioctl(fd, _FS_IOC_GETVERSION, version)
    return version[0] & 0xFFFFFFFF


def reopen(key: bytes, path: str | Path) -> int:
    """Open the file that has a key, by a path that anybody may have changed in the meantime.

    The path is first opened without access to what it leads to (O_PATH), so that no FIFO, device,
    terminal or file system of somebody else's can hold this process up or take effect.  Only when
    it is the regular file with this key is it opened for reading, through its descriptor.

    Args:
        key: what key_of() said of the file, as bytes of struct pagecache_file_key.
        path: where the file was; a symbolic link in its last component is not followed.

    Returns:
        A new descriptor, open for reading, which does not block and is closed on exec.

    Raises:
        FileNotFoundError: the path leads to nothing, or to anything but that file (ESTALE).
        OSError: it cannot be opened.
    """
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise FileNotFoundError(errno.ESTALE, "what has its name now is no file", str(path))
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(f"/proc/self/fd/{found}", flags)
    finally:
        os.close(found)
    try:
        if key_of(fd) != key:
            raise FileNotFoundError(errno.ESTALE, "another file has its name now", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def reopen_descriptor(fd: int) -> int:
    """Open the file behind a descriptor anew, without a path that anybody could have changed.

    The new descriptor has flags and a position of its own, so that whoever passed `fd` cannot
    change them under this process.  Where the file system refuses root (NFS with root_squash) it
    is a duplicate of `fd` instead.

    Args:
        fd: an open descriptor of a regular file.

    Returns:
        A descriptor that is open for reading, does not block and is closed on exec.

    Raises:
        OSError: `fd` is not open, or this process has no descriptor left.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return os.dup(fd)


def open_direct(fd: int) -> int:
    """Open the file behind a descriptor for direct I/O, without a path that anybody could change.

    Args:
        fd: an open descriptor of a regular file.

    Returns:
        A descriptor whose reads go past the page cache, closed on exec.

    Raises:
        OSError: its file system has no direct I/O (EINVAL), or this process may not read it.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)


def read_small_file(path: str | Path, most: int) -> bytes:
    """Read a file that lies beside weights and that anybody may have put there.

    It is opened as a path of a stranger has to be: a FIFO, a device or a directory of that name
    neither holds this process up nor takes effect, and a huge file does not fill its memory.

    Args:
        path: the file; links are followed.
        most: bytes that it may have.

    Returns:
        Its content, in bytes.

    Raises:
        OSError: it cannot be opened or read; EINVAL for what is no regular file, EFBIG for one
            that has more than `most` bytes.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        with open(os.open(f"/proc/self/fd/{found}", flags), "rb") as file:
            return file.read(status.st_size or most)  # files of /proc have no size
    finally:
        os.close(found)


def open_to_read(path: Path) -> int:
    """Open a file that the caller names, for reading and without side effects.

    Args:
        path: the file; links are followed.

    Returns:
        A descriptor that does not block and is closed on exec.

    Raises:
        PrivilegeError: this process may not read it.
        UsageError: it cannot be opened for another reason.
    """
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            kind = stat.S_IFMT(os.fstat(found).st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR):  # the caller says more about a directory
                raise UsageError(
                    f"{path} is not a regular file",
                    "opening a device, a FIFO or a socket could take effect",
                    "Name the file that holds the weights",
                    "docs/troubleshooting.md#is-not-a-regular-file",
                )
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            return os.open(f"/proc/self/fd/{found}", flags)
        finally:
            os.close(found)
    except PermissionError:
        raise PrivilegeError(
            f"{path} cannot be opened",
            "permission denied",
            "Run as a user who may read the file (root usually may)",
            "docs/troubleshooting.md#cannot-be-opened",
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be opened", error.strerror or str(error)) from None
