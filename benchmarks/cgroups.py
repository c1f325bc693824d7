# SPDX-License-Identifier: Apache-2.0
"""Cgroups for benchmarks: of memory, and one that limits a disk; which of the two LRUs reclaims.

Version 2; where the memory controller is mounted by itself version 1, which limits a group alike.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.disks import queue_of
from pagecache_bpf.errors import PagecacheError

CGROUPS = Path("/sys/fs/cgroup")
_VERSION_1 = CGROUPS / "memory"
_BLKIO_1 = CGROUPS / "blkio"
LRU_GEN = Path("/sys/kernel/mm/lru_gen/enabled")
_ENTER = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
_SCAN = 'for f in "$@"; do dd if="$f" of=/dev/null bs=128k status=none || exit 1; done'


class MemoryFigures:
    """The numbers that the kernel tells of one memory cgroup, a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def id(self) -> int:
        """Its number, as policies see it."""
        return self.path.stat().st_ino

    def stat(self, name: str) -> int:
        """Return one line of memory.stat."""
        return self._table("memory.stat")[name]

    def events(self, name: str) -> int:
        """Return one line of memory.events."""
        return self._table("memory.events")[name]

    def cpu_s(self, name: str) -> float:
        """Return the CPU seconds of its processes: of "user", "system" or both ("usage")."""
        return self._table("cpu.stat")[f"{name}_usec"] / 1e6

    def _table(self, name: str) -> dict[str, int]:
        lines = (self.path / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


class Group(MemoryFigures):
    """One memory cgroup."""

    def enter(self) -> None:
        """Move the calling process into it; what it has allocated stays charged elsewhere."""
        (self.path / "cgroup.procs").write_text("0")

    def run(self, *command: str, timeout_s: float = 300) -> float:
        """Run a command that is charged to it from its first page on; seconds.

        Raises PagecacheError when it fails.
        """
        begun = time.monotonic()
        done = subprocess.run(
            ["sh", "-c", _ENTER, str(self.path), *command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        seconds = time.monotonic() - begun
        if done.returncode:
            raise PagecacheError(f"`{command[0]}` failed in {self.path}", done.stderr.strip())
        return seconds

    def scan(self, files: Sequence[Path]) -> float:
        """read() files from front to back in pieces of 128 KiB, by a small process; seconds."""
        return self.run("sh", "-c", _SCAN, "scan", *map(str, files))

    def search(self, root: Path) -> float:
        """Search all files below a directory for what is not there; seconds."""
        return self.run(
            "sh", "-c", 'grep -rqF -- "$2" "$1"; test $? = 1', "x", str(root), "n0t here"
        )


@contextmanager
def group(name: str, max_bytes: int | None = None, parent: Path = CGROUPS) -> Iterator[Group]:
    """Yield a group for the block.  Raises PagecacheError where there is no memory controller."""
    first = parent == CGROUPS and (_VERSION_1 / "memory.limit_in_bytes").exists()
    control = parent / "cgroup.subtree_control"
    path = (_VERSION_1 if first else parent) / name
    try:
        if not first and "memory" not in control.read_text().split():
            control.write_text("+memory")
        path.mkdir()
    except OSError as error:
        raise PagecacheError("no memory cgroup can be made", str(error)) from error
    try:
        if max_bytes is not None:
            limit = "memory.limit_in_bytes" if first else "memory.max"
            (path / limit).write_text(str(max_bytes))
        yield Group(path)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a group as soon as the last process of it has gone."""
    deadline = time.monotonic() + 20
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextmanager
def limited_device(file: Path, rate: int) -> Iterator[None]:
    """Have the disk with a file give this process `rate` bytes a second at most, for the block.

    So a fast local disk answers as a volume does whose provider limits it.  Raises PagecacheError
    where the kernel has no such limit.
    """
    first = (_BLKIO_1 / "blkio.throttle.read_bps_device").exists()
    parent = _BLKIO_1 if first else CGROUPS
    path, before = parent / f"limited-{os.getpid()}", parent / _own_group("blkio" if first else "")
    try:
        if not first and "io" not in (parent / "cgroup.subtree_control").read_text().split():
            (parent / "cgroup.subtree_control").write_text("+io")
        path.mkdir()
    except OSError as error:
        raise PagecacheError("no cgroup that limits a disk can be made", str(error)) from error
    try:
        limit = "blkio.throttle.read_bps_device" if first else "io.max"
        disk = (queue_of(file).parent / "dev").read_text().strip()  # a partition has no limit
        (path / limit).write_text(f"{disk} {rate if first else f'rbps={rate}'}")
        (path / "cgroup.procs").write_text(str(os.getpid()))
        yield
    except OSError as error:
        raise PagecacheError(f"the disk with {file} cannot be limited", str(error)) from error
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        _remove(path)


def _own_group(controller: str) -> str:
    """Return the group of this process in a hierarchy, without its first slash."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return ""


@contextmanager
def reclaim_by(which: str) -> Iterator[None]:
    """Reclaim by the classic lists or by generations (MGLRU), for the block."""
    before = LRU_GEN.read_text()
    LRU_GEN.write_text({"classic": "0", "generations": "y"}[which])
    try:
        yield
    finally:
        LRU_GEN.write_text(before)
