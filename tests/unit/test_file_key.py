# SPDX-License-Identifier: Apache-2.0
"""Files that anybody may have swapped for something else: opened without waiting or effect.

S1 (a FIFO stops the controller), S2 (a terminal becomes the controller's own), S3 (a link to
another file) and S14 (FIFOs as side files) of the security review have one root: a path that a
stranger controls.  What is opened here is what takes the place of a weight file.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.file_key import (
    key_of,
    open_to_read,
    read_small_file,
    reopen,
    reopen_descriptor,
)
from pagecache_bpf.weights.models import resolve

Swap = Callable[[Path], object]


def _link_to_terminal(path: Path) -> tuple[int, int]:
    """The other side of the terminal stays open: the ends are kept by the caller."""
    ends = pty.openpty()
    path.symlink_to(os.ttyname(ends[1]))
    return ends


def _socket(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        listener.bind(path.name)
    finally:
        os.chdir(before)
    return listener


def _link_to_other(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"root:*:20000:0:99999:7:::\n")
    path.symlink_to(other)


SWAPS: dict[str, Swap] = {
    "fifo": os.mkfifo,
    "terminal": _link_to_terminal,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": Path.mkdir,
    "socket": _socket,
    "link to another file": _link_to_other,
    "link to what only root may read": lambda path: path.symlink_to("/etc/shadow"),
    "another file": lambda path: path.write_bytes(b"x" * 8192),
    "link to itself": lambda path: path.symlink_to(path),
    "nothing": lambda path: None,
}


@contextmanager
def at_once() -> Iterator[None]:
    """Fail, rather than hang for ever, where a call waits for somebody else."""

    def late(*_: object) -> None:
        raise AssertionError("the call waits for whoever holds the other end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("swap", SWAPS)
def test_s1_s2_s3_a_file_that_was_swapped_is_not_opened(tmp_path: Path, swap: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"w" * 4096)
    with path.open("rb") as original:
        key = key_of(original.fileno())
        path.rename(tmp_path / "kept")  # its inode number must not be given to another file
        effect = SWAPS[swap](path)
        with at_once(), pytest.raises(OSError) as caught:
            os.close(reopen(key, path))
        assert caught.value.errno in (errno.ESTALE, errno.ENOENT, errno.ELOOP)
        del effect
    os.close(reopen(key, tmp_path / "kept"))


def test_s2_a_terminal_does_not_become_the_sessions_own() -> None:
    """A session leader without a terminal gets the one that it opens, unless it asks not to."""
    program = (
        "import os, pty, sys\n"
        "from pathlib import Path\n"
        "from pagecache_bpf.kernel.file_key import open_to_read, reopen\n"
        "from pagecache_bpf.errors import UsageError\n"
        "os.setsid()\n"
        "ends = pty.openpty()\n"
        "name = os.ttyname(ends[1])\n"
        "for call in (lambda: open_to_read(Path(name)), lambda: reopen(bytes(24), name)):\n"
        "    try:\n"
        "        call()\n"
        "    except (OSError, UsageError):\n"
        "        pass\n"
        "print(open('/proc/self/stat').read().rpartition(')')[2].split()[4])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "0\n"  # tty_nr


def test_a_descriptor_of_its_own(tmp_path: Path) -> None:
    """Whoever passed the first one cannot change the flags or the position of the second."""
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789")
    with path.open("rb") as passed:
        fd = reopen_descriptor(passed.fileno())
        assert key_of(fd) == key_of(passed.fileno())
        passed.seek(7)
        path.unlink()
        assert os.read(fd, 3) == b"012"
        assert not os.get_inheritable(fd)
        os.close(fd)


@pytest.mark.parametrize("kind", ["fifo", "terminal", "device", "socket"])
def test_s14_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights"
    effect = SWAPS[kind](path)
    with at_once():
        with pytest.raises(UsageError, match="not a regular file"):
            open_to_read(path)
        with pytest.raises(OSError, match="not a regular file"):
            read_small_file(path, 100)
    del effect


@pytest.mark.parametrize("kind", ["fifo", "terminal", "device", "socket", "directory"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_s14_an_index_that_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name.removesuffix(".index.json")).write_bytes(b"w" * 4096)
    effect = SWAPS[kind](tmp_path / name)
    with at_once(), pytest.raises(UsageError, match="not a weight index: it is not a regular"):
        resolve(tmp_path)
    del effect


def test_s14_an_index_that_is_huge_does_not_fill_memory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"w" * 4096)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    os.truncate(index, 6 << 30)
    with pytest.raises(UsageError, match="more than"):
        resolve(tmp_path)


def test_s14_a_reference_of_a_hub_cache_that_is_a_fifo(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "snapshots" / "abc" / "model.safetensors").write_bytes(b"w" * 4096)
    (cache / "refs").mkdir()
    os.mkfifo(cache / "refs" / "main")
    with at_once():
        assert [file.name for file in resolve(cache).files] == ["model.safetensors"]
