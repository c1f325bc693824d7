# SPDX-License-Identifier: Apache-2.0
"""Where sockets are, and the long output of tools and of the kernel, for errors to point at."""

from __future__ import annotations

import os
from pathlib import Path

#: Sockets, locks and logs; the variable is for tests and for machines with another place.
RUN_DIR = Path(os.environ.get("PAGECACHE_BPF_RUN_DIR") or "/run/pagecache-bpf")
#: Names the controller's socket where it is not at its usual place, for clients and for `serve`.
SOCKET_VARIABLE = "PAGECACHE_BPF_SOCKET"


def socket_path() -> Path:
    """Tell where the controller's public socket is.

    A controller that is configured to listen elsewhere leaves a link in the run directory.

    Returns:
        $PAGECACHE_BPF_SOCKET, or the socket's place in the run directory.
    """
    return Path(os.environ.get(SOCKET_VARIABLE) or RUN_DIR / "control.sock")


def write_log(name: str, text: str, log_dir: Path | None = None) -> Path | None:
    """Write a log for people to look into; one that cannot be written hides no other error.

    Args:
        name: the file's name.
        text: what it holds.
        log_dir: its directory, made if absent; by default /run/pagecache-bpf for root and a new
            temporary directory for others.

    Returns:
        The file, None if nothing can be written.
    """
    try:
        if log_dir is None and os.geteuid() == 0:
            log_dir = RUN_DIR
        if log_dir is None:
            import tempfile  # takes milliseconds, which every load() would pay

            log_dir = Path(tempfile.mkdtemp(prefix="pagecache-bpf-"))
        directory = log_dir
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / name
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path
