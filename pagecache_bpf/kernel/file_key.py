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

from pagecache_bpf.errors import PrivilegeError, UnsupportedError, UsageError

_FS_IOC_GETVERSION = 0x80087601  # _IOR('v', 1, long)


def key_of(fd: int) -> bytes:
    """Return how the BPF programs know a file: by device, inode number and generation.

    It is the file that has the pages, which on overlayfs is one of a layer.

    Args:
        fd: the file's descriptor, open for reading.

    Returns:
        The bytes of struct pagecache_file_key.

    Raises:
        UnsupportedError: the kernel cannot be asked who has the pages, or nobody has.
        OSError: the descriptor is none.
    """
    # Late: files are read without them, and they take a while.
    from pagecache_bpf.kernel import abi, file_identity

    status = os.fstat(fd)
    # A file system on a block device of its own that tells generations (ext4, xfs, f2fs) has the
    # pages itself.  Of others stat() may tell another device or number than the kernel's events.
    own = bool(os.major(status.st_dev))
    generation = _generation(fd) if own else None
    if generation is None:
        try:
            return file_identity.pages_of(fd).key
        except PrivilegeError:
            pass  # whoever may not ask governs nothing: the file is compared with itself only
    return bytes(
        abi.pagecache_file_key(
            ino=status.st_ino,
            dev_major=os.major(status.st_dev),
            dev_minor=os.minor(status.st_dev),
            generation=generation or 0,
        )
    )


def told_key(fd: int, types: frozenset[str] | None, what: str) -> bytes:
    """Return how programs know a file, once it is certain that the kernel's events name it so.

    Args:
        fd: the file's descriptor, open for reading.
        types: of the programs, as file_identity.PagesOf.is_known() takes them.
        what: what cannot be done otherwise, for people.

    Returns:
        As key_of().

    Raises:
        UnsupportedError: the events name it otherwise or not at all, or it is in memory.
        OSError: the descriptor is none.
    """
    from pagecache_bpf.kernel import file_identity

    key = key_of(fd)
    file_identity.check_told(fd, key, types, what)
    return key


def _generation(fd: int) -> int | None:
    """Return the generation of an inode; None where the file system does not tell it."""
    version = array.array("L", [0])
    try:
        fcntl.ioctl(fd, _FS_IOC_GETVERSION, version)
    except OSError:
        return None
    return version[0] & 0xFFFFFFFF


def identity_of(fd: int) -> tuple[int, int, int, int]:
    """Return what a file is to the kernel's events, as control_device.Tag.identity has it.

    Args:
        fd: the file's descriptor, open for reading.

    Returns:
        The major and the minor number of the device, the number of the inode, its generation.

    Raises:
        UnsupportedError: as key_of().
        OSError: the descriptor is none.
    """
    from pagecache_bpf.kernel import abi

    key = abi.pagecache_file_key.from_buffer_copy(key_of(fd))
    return key.dev_major, key.dev_minor, key.ino, key.generation


def identity_at(path: str | Path) -> tuple[int, int, int, int]:
    """Return what the file at a path is to the kernel's events.

    Args:
        path: the file; links are followed.

    Returns:
        As identity_of().

    Raises:
        PrivilegeError: this process may not read it.
        UsageError: it cannot be opened for another reason.
        UnsupportedError: as key_of().
    """
    fd = open_to_read(Path(path))
    try:
        return identity_of(fd)
    finally:
        os.close(fd)


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
        fd = _open_behind(found)
    finally:
        os.close(found)
    try:
        with suppress(UnsupportedError):  # a file without pages: not that one
            if key_of(fd) == key:
                return fd
        raise FileNotFoundError(errno.ESTALE, "another file has its name now", str(path))
    except BaseException:
        os.close(fd)
        raise


def _open_behind(fd: int) -> int:
    """Open the file behind a descriptor for reading: neither waits nor gets a terminal by it."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    return os.open(f"/proc/self/fd/{fd}", flags)


def may_write(fd: int) -> bool:
    """Tell whether this process could open the file behind a descriptor for writing.

    Args:
        fd: an open descriptor.

    Returns:
        What access(2) says of it; False also where there is no procfs.
    """
    return os.access(f"/proc/self/fd/{fd}", os.W_OK)


def path_of(fd: int) -> str:
    """Return the name that the kernel shows for a descriptor, for people and for looking it up.

    Args:
        fd: an open descriptor.

    Returns:
        The file's path in this process's mounts; with " (deleted)" behind it if it has none left.

    Raises:
        OSError: `fd` is not open, or there is no procfs.

    Source: proc(5), /proc/PID/fd.
    """
    return os.readlink(f"/proc/self/fd/{fd}")


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
    try:
        return _open_behind(fd)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return os.dup(fd)


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
        with open(_open_behind(found), "rb") as file:
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
            return _open_behind(found)
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
