# SPDX-License-Identifier: Apache-2.0
"""Tags: what they name, what they hold, who may set them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.control_device import Device
from tests.vm.kernel import attached, make_file, read_pages, resident, test_policy

pytestmark = pytest.mark.vm

WINDOW = test_policy("window")


def test_record(mount: Path) -> None:
    file = make_file(mount / "weights", 101)
    with attached(WINDOW, file) as policy:
        (tag,) = policy.device.tags()
        info = file.stat()
        assert (tag.ino, tag.policy, tag.model, tag.path) == (
            info.st_ino,
            "window",
            "test",
            str(file),
        )
        assert tag.active
        assert policy.status.tags == 1
        with pytest.raises(PagecacheError):
            policy.tag(file)
        policy.tag(file, replace=True)
        assert len(list(policy.device.tags())) == 1


def test_a_hard_link_is_the_same_file(mount: Path) -> None:
    file = make_file(mount / "weights", 307)
    link = mount / "link"
    link.unlink(missing_ok=True)
    os.link(file, link)
    with attached(WINDOW, file, window_pages=211):
        read_pages(link, 0, 1)
        assert resident(file) == 211


def test_a_reused_inode_is_another_file(mount: Path) -> None:
    """Inode numbers are reused at once on ext4; the generation tells the files apart."""
    file = make_file(mount / "weights", 307)
    ino = file.stat().st_ino
    with attached(WINDOW, file, window_pages=211) as policy:
        file.unlink()
        for _ in range(50):
            file = make_file(mount / "weights", 307)
            if file.stat().st_ino == ino:
                break
            file.unlink()
        else:
            pytest.fail("the inode number was not reused")
        read_pages(file, 0, 1)
        assert resident(file) <= 32
        assert policy.count("readahead_calls") == 0


def test_a_tag_does_not_hold_its_file(scratch_fs: Path, remount: object) -> None:
    assert callable(remount)
    file = make_file(scratch_fs / "weights", 307)
    with attached(WINDOW, file, window_pages=211):
        remount()
        read_pages(file, 0, 1)
        assert resident(file) == 211


def test_overlay_reads_the_backing_inode(mount: Path, tmp_path: Path) -> None:
    lower, merged = mount / "lower", tmp_path / "merged"
    for folder in (lower, mount / "upper", mount / "work", merged):
        folder.mkdir()
    file = make_file(lower / "weights", 307)
    options = f"lowerdir={lower},upperdir={mount}/upper,workdir={mount}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
    try:
        with attached(WINDOW, merged / "weights", window_pages=211):
            read_pages(merged / "weights", 0, 1)
            assert resident(file) == 211
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def test_not_for_everyone(mount: Path) -> None:
    file = make_file(mount / "weights", 101)
    code = (
        "import os; os.setgid(65534); os.setuid(65534)\n"
        "try: os.open('/dev/pagecache_bpf', os.O_RDWR)\n"
        "except PermissionError: print('refused')"
    )
    with attached(WINDOW, file):
        out = subprocess.run(
            ["python3", "-c", code], capture_output=True, text=True, check=True
        ).stdout
    assert out == "refused\n"


def test_what_cannot_be_tagged(mount: Path) -> None:
    with attached(WINDOW) as policy:
        for path in (Path("/proc/self/maps"), Path("/dev/null"), mount):
            fd = os.open(path, os.O_RDONLY)
            with pytest.raises(PagecacheError):
                policy.device.tag(fd, policy="window", model="m", path=str(path))
            os.close(fd)
        file = make_file(mount / "weights", 11)
        fd = os.open(file, os.O_WRONLY)
        with pytest.raises(PagecacheError):
            policy.device.tag(fd, policy="window", model="m", path=str(file))
        os.close(fd)
        with pytest.raises(PagecacheError):
            policy.device.tag(-1, policy="window", model="m", path="closed")


def test_many_tags(mount: Path) -> None:
    """A model of many shards: every one is listed once, and removed."""
    shards = mount / "shards"
    shards.mkdir()
    with attached(WINDOW) as policy:
        for number in range(1009):
            path = shards / f"{number}"
            path.write_bytes(b"x")
            policy.tag(path)
        tags = list(policy.device.tags())
        assert {tag.path for tag in tags} == {str(shards / f"{n}") for n in range(1009)}
        assert policy.status.tags == 1009
        for tag in tags:
            policy.device.untag(tag.dev_major, tag.dev_minor, tag.ino, tag.generation)
        assert policy.status.tags == 0
        with Device() as device:
            assert device.info().tags == 0
