# SPDX-License-Identifier: Apache-2.0
"""Whether a path leads to a file with weights in it, and what it is if not.

The file is opened without side effects, so that a FIFO or a device in its place does not stop
this process.  Each way in which this fails has an error of its own, which names the file.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UsageError
from pagecache_bpf.kernel import kernelfs
from pagecache_bpf.kernel.cachestat import has_page_cache
from pagecache_bpf.kernel.file_key import path_of
from pagecache_bpf.weights.names import is_unfinished

#: File systems whose pages are the only copy: there is no device to read ahead from.
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
#: A Git LFS pointer has about 130 bytes; its specification says "less than 1024 bytes".
_POINTER_BYTES = 1024
#: hawser is what it was called in its first year.
_POINTER = re.compile(
    rb"version https://(?:git-lfs\.github|hawser\.github)\.com/spec/v\d+\r?\n"
    rb"(?:.*\n)*?size (\d+)\r?(?:\n|\Z)"
)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
_DOCS = "docs/troubleshooting.md"
#: Not every C library asks for the rights of the effective user.
_EFFECTIVE = os.access in os.supports_effective_ids

#: What /proc/PID/root, or a thread's, begins a path with.
_ROOT_OF_PROCESS = re.compile(r"/proc/(?:\d+(?:/task/\d+)?|self|thread-self)/root(?=/)")


def follow(path: Path) -> os.stat_result:
    """Ask for the status of what a path leads to.

    Args:
        path: the path; links are followed.

    Returns:
        The status.

    Raises:
        UsageError: it leads to nothing.
        PrivilegeError: it may not be followed.
    """
    try:
        return path.stat()
    except OSError as error:
        raise path_error(path, error) from None


def path_error(path: Path, error: OSError) -> PagecacheError:
    """Make the error for a path that cannot be followed or opened.

    Args:
        path: the path that could not be used, as the user named it.
        error: what the system call failed with.

    Returns:
        A PrivilegeError where permission is denied, otherwise a UsageError; to be raised.
    """
    if error.errno == errno.ENOENT and path.is_symlink():
        return UsageError(
            f"{path} is a broken symbolic link",
            f"it points to {os.readlink(path)}, which does not exist",
            "Download or restore that file, then try again",
            f"{_DOCS}#is-a-broken-symbolic-link",
        )
    if error.errno == errno.ENOENT:
        return UsageError(
            f"{path} does not exist",
            "",
            "Check the path for typing errors",
            f"{_DOCS}#does-not-exist",
        )
    if error.errno == errno.ELOOP:
        return UsageError(
            f"{path} cannot be followed",
            "its symbolic links lead back to themselves",
            "Point the link at the real file",
            f"{_DOCS}#cannot-be-followed",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return PrivilegeError(
            f"{path} cannot be opened",
            "permission denied",
            "Run as a user who may read the file (root usually may)",
            f"{_DOCS}#cannot-be-opened",
        )
    return UsageError(f"{path} cannot be opened", os.strerror(error.errno or 0))


def regular(
    path: str | Path, directories: dict[str, Path] | None = None
) -> tuple[Path, os.stat_result]:
    """Check that a path leads to a regular file.

    Args:
        path: the path; links are followed.
        directories: real paths of directories that are known already; added to, so that each of
            1,000 files in one directory costs one look at the file itself, and of links one more.

    Returns:
        The file's real path and its status.

    Raises:
        UsageError: it is something else, or it does not exist.
        PrivilegeError: it may not be reached.
    """
    if directories is not None and (found := _in_known_directory(os.fspath(path), directories)):
        return found
    path = Path(path)
    status = follow(path)
    if not stat.S_ISREG(status.st_mode):
        kind = next((text for test, text in _KINDS if test(status.st_mode)), "something else")
        raise UsageError(
            f"{path} is not a regular file",
            f"it is {kind}",
            "Name the file that holds the weights",
            f"{_DOCS}#is-not-a-regular-file",
        )
    return real_path(path), status


def _in_known_directory(
    path: str, directories: dict[str, Path]
) -> tuple[Path, os.stat_result] | None:
    """Return what regular() does of a file, or of a link to one; None for all that is rarer.

    What is costly about a real path is that of the directory, and files of a model share that: the
    blobs of a cache, too, to which the links of a snapshot lead.
    """
    try:
        status = os.lstat(path)
        directory, _, name = path.rpartition("/")
        if stat.S_ISLNK(status.st_mode):
            # The kernel follows "..", which text cannot: the directory may be a link itself.
            target = os.readlink(path)
            path = target if target.startswith("/") else f"{directory}/{target}"
            status = os.lstat(path)
            directory, _, name = path.rpartition("/")
        if not stat.S_ISREG(status.st_mode):
            return None
        if directory not in directories:
            directories[directory] = real_path(Path(directory or "/"))
    except OSError:
        return None
    return directories[directory] / name, status


def real_path(path: Path) -> Path:
    """Return a path without symbolic links that leads to the same file from here.

    Below /proc/PID/root it stays below it: that link leads into the mounts of another process (a
    container), and the path that it reads as means nothing, or another file, outside of them.

    Args:
        path: a path that leads to something.

    Returns:
        The path; the same as before where none without links leads to it from here.

    Raises:
        OSError: it leads to nothing, below /proc/PID/root.
    """
    root = _ROOT_OF_PROCESS.match(os.path.abspath(path))
    if root is None:
        return Path(os.path.realpath(path))
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        inside = Path(root[0] + path_of(fd))
        if inside.exists() and os.path.samestat(inside.stat(), os.fstat(fd)):
            return inside
        return Path(os.path.abspath(path))
    finally:
        os.close(fd)


def refuse_pointer(shown: str | Path, content: bytes) -> None:
    """Refuse what git leaves in the place of a large file that was not downloaded.

    Args:
        shown: the name that people see.
        content: what is in the file.

    Raises:
        UsageError: it is a pointer of Git LFS.
    """
    pointer = _POINTER.match(content) if len(content) < _POINTER_BYTES else None
    if pointer:
        raise UsageError(
            f"{shown} is a Git LFS pointer",
            f"the {int(pointer[1]):,} bytes that it stands for were not downloaded",
            "Run git lfs pull in its directory",
            f"{_DOCS}#is-a-git-lfs-pointer",
        )


def require_weights(
    shown: str | Path, real: Path, status: os.stat_result, kinds: dict[int, str | None]
) -> None:
    """Refuse a file whose pages cannot be read ahead, or that stands in for one not downloaded.

    Args:
        shown: the name that people see.
        real: the regular file that it leads to.
        status: of that file.
        kinds: types of the file systems of which a file has passed already, by device number;
            added to.  What is true of all files of one is not asked again.

    Raises:
        UsageError: the file is in memory, virtual, empty, a Git LFS pointer or unfinished.
        PrivilegeError: it may not be opened.
    """
    # Whether files have a page cache is decided by the file system, but for those of a daemon
    # (FUSE), which decides it of each file.
    name = os.path.basename(shown)
    alike = not (kinds.get(status.st_dev) or "fuse").startswith(("fuse", "virtiofs"))
    if status.st_dev not in kinds:
        kinds[status.st_dev] = kernelfs.LIVE.fstype(status.st_dev)
    fstype = kinds[status.st_dev]
    if (
        alike
        and status.st_size >= _POINTER_BYTES
        and not is_unfinished(name)
        and os.access(real, os.R_OK, effective_ids=_EFFECTIVE)
    ):
        return
    if fstype in IN_MEMORY:
        raise UsageError(
            f"{real} has no pages to read ahead",
            f"on {fstype} the file is in memory already",
            "Name the copy on disk, if there is one",
            f"{_DOCS}#has-no-pages-to-read-ahead",
        )
    try:
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise path_error(Path(shown), error) from None
    try:
        if not has_page_cache(fd):
            raise UsageError(
                f"{real} has no pages to read ahead",
                f"the file system ({fstype or 'unknown'}) does not keep it in the page cache",
                "Name a file on a disk or network file system",
                f"{_DOCS}#has-no-pages-to-read-ahead",
            )
        if status.st_size == 0:
            raise UsageError(
                f"{shown} is empty",
                "there is nothing to read ahead",
                "Check that the download or copy has finished",
                f"{_DOCS}#is-empty",
            )
        if is_unfinished(name):
            raise UsageError(
                f"{shown} is not complete",
                "its name is that of a download in progress",
                "Wait for the download, or start it again",
                f"{_DOCS}#is-not-complete",
            )
        if status.st_size < _POINTER_BYTES:
            refuse_pointer(shown, os.pread(fd, _POINTER_BYTES, 0))
    finally:
        os.close(fd)
