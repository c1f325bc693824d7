# SPDX-License-Identifier: Apache-2.0
"""A file system whose server does not answer: readers wait, and nothing of ours waits with them.

squashfuse stands in for the servers of NFS, Lustre and stores that are mounted; it is stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.kernel.file_pages import known_status
from tests.native.filesystems import MODEL, PAGE_SIZE, PAGES
from tests.native.test_record import _nothing_attached  # noqa: F401  # a fixture
from tests.unit.command import done, run
from tests.vm.kernel import make_file, wait_for

pytestmark = pytest.mark.native
#: Seconds in which a command is over on a busy machine; a server that is stopped takes for ever.
SOON = 60


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A model on a FUSE file system, and its server."""
    for name in ("squashfuse", "mksquashfs"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    source, image, at = tmp_path / "source", tmp_path / "image", tmp_path / "at"
    source.mkdir()
    at.mkdir()
    make_file(source / MODEL, PAGES)
    subprocess.run(["mksquashfs", source, image, "-quiet", "-no-progress", "-noD"], check=True)
    with subprocess.Popen(["squashfuse", "-f", image, at]) as server:
        wait_for((at / MODEL).exists, "the server to answer")
        try:
            yield at / MODEL, server
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "--lazy", at], check=True)
            server.terminate()


def test_nothing_of_ours_waits_for_a_server(served: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, server = served
    done("attach", "sequential", "--engine", "agent", "--model", "served", path)
    with path.open("rb", buffering=0) as file:
        file.read(1 << 20)
        server.send_signal(signal.SIGSTOP)
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
            server.send_signal(signal.SIGCONT)
        assert waiting.wait(SOON) == 0
        assert os.pread(file.fileno(), 1, PAGES * PAGE_SIZE - 1)
