# SPDX-License-Identifier: Apache-2.0
"""Where the long output of tools and of the kernel is kept, for errors to point at."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

#: Sockets, locks and logs; the variable is for tests and for machines with another place.
RUN_DIR = Path(os.environ.get("PAGECACHE_BPF_RUN_DIR") or "/run/pagecache-bpf")


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
        directory = log_dir or Path(tempfile.mkdtemp(prefix="pagecache-bpf-"))
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / name
        path.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path
