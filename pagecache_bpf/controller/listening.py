# SPDX-License-Identifier: Apache-2.0
"""The sockets of the controller in the file system: who may reach and who may connect to them."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import suppress
from pathlib import Path

from pagecache_bpf.errors import PagecacheError


def listen_on(path: Path, mode: int) -> socket.socket:
    """Bind a Unix socket, in the place of one that nobody listens on any more.

    Args:
        path: where; this process holds the controller's lock, so nobody else listens there.
        mode: who may connect.

    Returns:
        The socket, which does not listen yet.

    Raises:
        PagecacheError: it cannot be made there.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise PagecacheError(
            f"{path} cannot be listened on", error.strerror or str(error)
        ) from error
    finally:
        os.umask(before)
    os.chmod(path, mode)
    return listener


def make_open(directory: Path) -> None:
    """Make a directory, if there is none, that every user may pass through (mode 0755).

    Args:
        directory: the directory; those above it are made, too.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        path.chmod(0o755)


def raise_descriptors() -> None:
    """Raise the limit of open descriptors as far as allowed: clients pass many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
