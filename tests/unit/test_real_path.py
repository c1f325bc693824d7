# SPDX-License-Identifier: Apache-2.0
"""Paths below /proc/PID/root, which lead into the mounts of another process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights.files import real_path, regular

HIDE = 'mount --make-rprivate / && mount --bind "$1" "$2" && echo ready && exec cat'


def test_links_of_this_root_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert real_path(tmp_path / "link") == Path(os.path.realpath(tmp_path)) / "file"


def test_own_root_stays_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = Path(f"/proc/self/root{os.path.realpath(tmp_path)}/file")
    assert real_path(path) == path
    assert regular(path)[0] == path


def test_mounts_of_another_process(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_text("x")
    (source / "link").symlink_to("file")
    command = ["unshare", "--mount", "sh", "-c", HIDE, "sh", str(source), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        if process.stdout.readline() != b"ready\n":
            pytest.skip("this user may not have mounts of its own")
        base = Path(f"/proc/{process.pid}/root{os.path.realpath(target)}")
        found = real_path(base / "link")
        assert found == base / "file" and os.path.samefile(found, source / "file")
        process.stdin.close()
    assert not (target / "file").exists()


def test_links_out_of_a_directory_that_is_a_link(tmp_path: Path) -> None:
    """What is known of directories must not be known by text: here ".." is not what it looks."""
    blobs = tmp_path / "real" / "blobs"
    snapshot = tmp_path / "real" / "snapshots" / "r1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0a").write_text("x")
    (snapshot / "1").symlink_to("../../blobs/0a")
    (snapshot / "2").symlink_to(blobs / "0a")  # absolute
    (snapshot / "3").symlink_to("1")  # a link to a link
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shown").symlink_to(snapshot)
    known: dict[str, Path] = {}
    for name in ("1", "2", "3", "1"):
        path = tmp_path / "elsewhere" / "shown" / name
        found, status = regular(path, known)
        assert found == Path(os.path.realpath(path)) == Path(os.path.realpath(blobs)) / "0a"
        assert status.st_ino == (blobs / "0a").stat().st_ino
    with pytest.raises(UsageError, match="broken symbolic link"):
        (snapshot / "4").symlink_to("../../blobs/0b")
        regular(snapshot / "4", known)
    with pytest.raises(UsageError, match="it is a directory"):
        regular(snapshot, known)
