# SPDX-License-Identifier: Apache-2.0
"""Memory cgroups in the guest: sets a limit, runs commands below it, tells what became of them.

Knows no workload.  Needs root: it makes groups in the root cgroup, for the length of a block.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.cachestat import drop
from benchmarks.cgroups import CGROUPS, LRU_GEN, MemoryFigures, reclaim_by

__all__ = ["CGROUPS", "LRU_GEN", "Group", "fill", "group", "reclaim_by", "stretch"]

_ENTER = 'echo $$ >"$0"/cgroup.procs && exec "$@"'


class Group(MemoryFigures):
    """A memory cgroup (version 2)."""

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command that is charged to it from its first page on."""
        return subprocess.Popen(
            ["sh", "-c", _ENTER, str(self.path), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, seconds: float = 120) -> int:
        """Run a command in it; its exit status, -9 for one that the OOM killer got."""
        process = self.start(*command)
        try:
            process.communicate(timeout=seconds)
        finally:
            process.kill()
            process.wait()
        return process.returncode

    def read(self, *files: Path) -> None:
        """Read files from front to back; fails if that does."""
        for path in files:
            assert self.run("dd", f"if={path}", "of=/dev/null", "bs=1M") == 0, path

    def read_part(self, path: Path, start: int, mib: int) -> None:
        """Read so many MiB of a file from MiB `start` on."""
        part = f"skip={start}", f"count={mib}"
        assert self.run("dd", f"if={path}", "of=/dev/null", "bs=1M", *part) == 0, path

    def allocate(self, mib: int) -> int:
        """Fill memory that no file backs; the exit status."""
        return self.run("dd", "if=/dev/zero", "of=/dev/null", f"bs={mib}M", "count=1")

    def set(self, **knobs: int) -> None:
        """Write memory.KNOB, in bytes."""
        for name, value in knobs.items():
            (self.path / f"memory.{name}").write_text(str(value))


@contextmanager
def group(name: str, parent: Path = CGROUPS, **knobs: int) -> Iterator[Group]:
    """Yield a group for the block; what still runs in it at the end is killed."""
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")
    path = parent / name
    path.mkdir()
    it = Group(path)
    try:
        it.set(**knobs)
        yield it
    finally:
        (path / "cgroup.kill").write_text("1")
        _remove(path)


def _remove(path: Path, seconds: float = 20) -> None:
    """Remove a group; those who were killed in it leave a moment later."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return path.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def stretch(path: Path, mib: int) -> Path:
    """Return a file of that size, never written: its pages are filled without the device."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, mib << 20)
    return path


def fill(path: Path, mib: int) -> Path:
    """Return a file of that size, on the device and out of the cache."""
    subprocess.run(
        ["dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={mib}", "conv=fsync"],
        check=True,
        capture_output=True,
    )
    drop([path])
    return path
