# SPDX-License-Identifier: Apache-2.0
"""What errors of the module's control device mean, and what to do about them."""

from __future__ import annotations

import errno
from pathlib import Path

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError, UsageError


def open_error(path: Path, error: OSError) -> PagecacheError:
    """Turn the errno of opening the device into what to do about it.

    Args:
        path: the device.
        error: what open(2) said.

    Returns:
        The error to raise.
    """
    if error.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(
            f"{path} cannot be opened", "this needs root", "Run the command with sudo"
        )
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return UnsupportedError(
            "the kernel module is not loaded",
            f"{path} does not exist",
            "Run `pagecache-bpf doctor` to see whether and how it can be loaded",
        )
    return PagecacheError(f"{path} cannot be opened", error.strerror or str(error))


def tag_error(error: OSError, path: str, policy: str) -> PagecacheError:
    """Turn the errno of tagging a file into what to do about it.

    Args:
        error: what the module said.
        path: the file.
        policy: the policy that was to govern it.

    Returns:
        The error to raise.
    """
    usage = {
        errno.ESRCH: (f"the policy {policy} is not attached", "Attach it first"),
        errno.EEXIST: (
            "it is tagged already",
            "Untag it first, or ask for the tag to be replaced",
        ),
        errno.EINVAL: ("it is not a regular file with pages in the page cache", ""),
        errno.EBADF: ("it is not open for reading", ""),
    }
    if error.errno in usage:
        return UsageError(f"{path} was not tagged", *usage[error.errno])
    return PagecacheError(f"{path} was not tagged", error.strerror or str(error))


def lend_error(error: OSError, fd: int) -> PagecacheError:
    """Turn the errno of lending a file into what to do about it.

    Args:
        error: what the module said.
        fd: the file's descriptor.

    Returns:
        The error to raise.
    """
    usage = {
        errno.ENOENT: ("it is not tagged", "Tag it first"),
        errno.EEXIST: ("it is lent from here already", ""),
        errno.EBADF: ("it is not open for reading", ""),
        errno.EINVAL: ("it is not a regular file", ""),
        errno.EOPNOTSUPP: ("its pages are those of another file (overlayfs)", ""),
    }
    what = f"file descriptor {fd} was not lent"
    if error.errno in usage:
        return UsageError(what, *usage[error.errno])
    if error.errno == errno.ENOSPC:
        return PagecacheError(
            what,
            "as many files are lent as the module allows",
            "Load the module with a larger max_lent",
        )
    return PagecacheError(what, error.strerror or str(error))
