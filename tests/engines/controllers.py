# SPDX-License-Identifier: Apache-2.0
"""A controller for the engines: in a container of our image, or in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.delivery.podman import IMAGE, RUN, Podman, as_documented, why_not
from tests.native.controller import serving
from tools import dist

NAME = "pagecache-bpf-of-engines"
ARCHIVE = dist.OUT / f"pagecache-bpf-image-{dist.version()}.tar"


@contextmanager
def running(place: Path) -> Iterator[Path]:
    """Run a controller for the block.

    Args:
        place: a directory for its socket.

    Yields:
        The socket.
    """
    shared = place / "run"
    shared.mkdir()
    with _contained(shared) if not why_not() and ARCHIVE.exists() else serving(shared):
        yield shared / "control.sock"


@contextmanager
def _contained(shared: Path) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="podman.", dir="/tmp") as scratch:
        podman = Podman(Path(scratch))
        podman("load", "-q", "-i", str(ARCHIVE))
        options = [
            f"{shared}:{RUN}" if option == f"{RUN}:{RUN}" else option for option in as_documented()
        ]
        try:
            podman("run", "-d", "--name", NAME, *options, IMAGE)
            podman.follow(NAME, "listening")
            yield
        finally:
            podman("rm", "-f", "-t", "20", NAME, check=False)
            podman("rmi", "-f", IMAGE, check=False)
