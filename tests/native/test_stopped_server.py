# SPDX-License-Identifier: Apache-2.0
"""A file system whose server does not answer: readers wait, and nothing of ours waits with them.

squashfuse stands in for the servers of Lustre and of stores that are mounted; it is stopped.  That
of NFS is the kernel's own, where it has one, and ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagecache_bpf.kernel.file_pages import known_status
from tests.native.filesystems import MODEL, PAGE_SIZE, PAGES, Places, made_in, make_cold, serve_nfs
from tests.native.test_record import _nothing_attached  # noqa: F401  # a fixture
from tests.unit.command import done, run
from tests.vm.kernel import PATIENCE, make_file, wait_for

pytestmark = pytest.mark.native
#: Seconds in which a command is over on a busy machine; a server that is stopped takes for ever.
SOON = 60 * PATIENCE


@dataclass(frozen=True)
class Served:
    """A model on a file system that a server has.

    path: of the model; stop, go: have the server answer no longer, and again.
    """

    path: Path
    stop: Callable[[], None]
    go: Callable[[], None]


@contextmanager
def _fuse(place: Path) -> Iterator[Served]:
    for name in ("squashfuse", "mksquashfs"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    source, image, at = place / "source", place / "image", place / "at"
    source.mkdir()
    at.mkdir()
    make_file(source / MODEL, PAGES)
    subprocess.run(["mksquashfs", source, image, "-quiet", "-no-progress", "-noD"], check=True)
    with subprocess.Popen(["squashfuse", "-f", image, at]) as server:
        wait_for((at / MODEL).exists, "the server to answer")
        try:
            yield Served(
                at / MODEL,
                lambda: server.send_signal(signal.SIGSTOP),
                lambda: server.send_signal(signal.SIGCONT),
            )
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "--lazy", at], check=True)
            server.terminate()


@contextmanager
def nfs(places: Places) -> Iterator[Served]:
    """The model of tests/native/filesystems.py on NFS, and the kernel that serves it.

    places: where it is, or is made.
    """
    path = places.get("nfs")
    make_cold(path)
    try:
        yield Served(path, lambda: serve_nfs(places, 0), lambda: serve_nfs(places, 2))
    finally:
        serve_nfs(places, 2)


@contextmanager
def _nfs(place: Path) -> Iterator[Served]:
    with made_in(place) as places, nfs(places) as served:
        yield served


SERVERS = {"fuse": _fuse, "nfs": _nfs}


@pytest.fixture(params=SERVERS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A model that a server has, by kind of server."""
    with SERVERS[request.param](tmp_path) as found:
        yield found


def test_nothing_of_ours_waits_for_a_server(served: Served) -> None:
    path = served.path
    done("attach", "sequential", "--engine", "agent", "--model", "served", path)
    with path.open("rb", buffering=0) as file:
        file.read(1 << 20)
        served.stop()
        waiting = subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL)
        try:
            time.sleep(2)  # the attributes that the kernel keeps for a second are old now
            assert waiting.poll() is None
            assert known_status(file.fileno()).size == PAGES * PAGE_SIZE
            for words in (("status",), ("stats",), ("tags", "--json"), ("detach", "--all")):
                begun = time.monotonic()
                result = run(*words)
                assert (result.code, time.monotonic() - begun < SOON) == (0, True), words
            assert done("status", "--json").data["policies"] == []
            assert waiting.poll() is None
        finally:
            served.go()
        assert waiting.wait(SOON) == 0
        assert os.pread(file.fileno(), 1, PAGES * PAGE_SIZE - 1)
