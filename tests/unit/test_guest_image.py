# SPDX-License-Identifier: Apache-2.0
"""The disk that the guest's Python is on: what is in it, as e2fsprogs reads it."""

from __future__ import annotations

import importlib.util
import marshal
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.guest import image
from benchmarks.guest.console import problems_of


def read(disk: Path, path: Path, out: Path) -> bytes:
    """A file of an ext4 image; empty if there is none."""
    out.unlink(missing_ok=True)
    command = ["/sbin/debugfs", "-R", f"dump -p {path} {out}", str(disk)]
    subprocess.run(command, capture_output=True, check=True)
    return out.read_bytes() if out.exists() else b""


def test_it_has_the_directories_and_their_bytecode(tmp_path: Path) -> None:
    """At their own paths, compiled, with tracebacks that name those; what is left out is not."""
    source = tmp_path / "source"
    (source / "skipped").mkdir(parents=True)
    (source / "skipped" / "big").write_text("never")
    module = source / "module.py"
    module.write_text("answer = 42\n")
    (source / "link").symlink_to("module.py")
    disk = tmp_path / "disk.img"
    image.make(disk, {source: ("skipped",)})
    out = tmp_path / "out"
    assert read(disk, module, out) == module.read_bytes()
    assert out.stat().st_mtime == int(module.stat().st_mtime)  # or the bytecode counts as old
    bytecode = read(disk, Path(importlib.util.cache_from_source(str(module))), out)
    assert marshal.loads(bytecode[16:]).co_filename == str(module)
    assert not read(disk, source / "skipped" / "big", out)
    assert not list(source.rglob("__pycache__")), "the host's own directory is as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "source"]


def test_packages_are_made_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A venv that got another package makes the image stale."""
    packages = tmp_path / "packages"
    packages.mkdir()
    made: list[Path] = []

    def make(disk: Path, sources: object) -> None:
        made.append(disk)
        disk.touch()

    monkeypatch.setattr(image, "_site_packages", lambda: [packages])
    monkeypatch.setattr(image, "make", make)
    disk = image.packages_image(tmp_path / "build")
    image.packages_image(tmp_path / "build")
    assert made == [disk]
    later = disk.stat().st_mtime + 1
    os.utime(packages, (later, later))
    image.packages_image(tmp_path / "build")
    assert made == [disk, disk]


def test_a_boot_after_which_lockdep_is_silent_is_a_problem() -> None:
    """Other complaints of the boot are the emulated machine's; the last start counts."""
    boot = "WARNING: of the machine\n"
    silent = "[ 5.7] Disabling lock debugging due to kernel taint\n"
    assert problems_of(f"{boot}GO\nfine\n", "GO") == []
    assert problems_of(f"{boot}GO\nBUG: KASAN: x\n", "GO") == ["BUG: KASAN: x"]
    assert problems_of(f"{boot}{silent}GO\nfine\n", "GO") == [silent.strip()]
