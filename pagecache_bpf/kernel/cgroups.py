# SPDX-License-Identifier: Apache-2.0
"""What a memory cgroup still has room for: its limit less what cannot be reclaimed.

cgroup v2 is read where it has the memory controller, v1 only where it has not.  Every ancestor
counts, as the tightest one decides; those above a cgroup namespace cannot be seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pagecache_bpf.errors import UsageError
from pagecache_bpf.kernel.kernelfs import LIVE, KernelFS, Mount

_DOCS = "docs/troubleshooting.md#is-not-a-memory-cgroup"
_UNLIMITED = 1 << 62  # v1 says LONG_MAX, rounded down to a page


@dataclass(frozen=True)
class Level:
    """One memory cgroup; every number is bytes and includes the cgroups below.

    Attributes:
        path: its path in the hierarchy.
        limit: what the kernel never exceeds; None: no limit.
        high: where the kernel begins to throttle (version 2); None: no limit.
        used: what is charged to it now.
        reclaimable: clean pages of files, which make room for others when they have to.  Anonymous
            memory is not counted, swap or no swap, nor are dirty pages and slab.
    """

    path: str
    limit: int | None
    high: int | None
    used: int
    reclaimable: int

    @property
    def bound(self) -> int | None:
        """The lower of limit and high; None without either."""
        return min((bound for bound in (self.limit, self.high) if bound is not None), default=None)

    @property
    def headroom(self) -> int | None:
        """Bytes that fit in when all that can be reclaimed is; None without a bound."""
        return None if self.bound is None else max(0, self.bound - self.used + self.reclaimable)

    @property
    def free(self) -> int | None:
        """Bytes that fit in before anything has to be reclaimed; None without a bound."""
        return None if self.bound is None else max(0, self.bound - self.used)


@dataclass(frozen=True)
class Memory:
    """A memory cgroup and its ancestors.

    Attributes:
        version: of the hierarchy with the memory controller, 1 or 2; None: there is none.
        path: the cgroup's path in the hierarchy.
        levels: the cgroup and its ancestors, the cgroup first; empty without a memory controller.
    """

    version: int | None
    path: str
    levels: tuple[Level, ...] = ()

    @property
    def tightest(self) -> Level | None:
        """The level with the least headroom; None where nothing is bounded."""
        bounded = [level for level in self.levels if level.headroom is not None]
        return min(bounded, key=lambda level: level.headroom or 0, default=None)

    @property
    def headroom(self) -> int | None:
        """Bytes that the tightest level has room for; None where nothing is bounded."""
        return self.tightest.headroom if self.tightest else None


def of_process(pid: int | None = None, kernel: KernelFS = LIVE) -> Memory:
    """Return the memory cgroup that a process is charged to.

    Args:
        pid: the process; by default this one.
        kernel: where the kernel's files are read.

    Returns:
        The cgroup's limits and counts, in bytes.

    Raises:
        UsageError: there is no such process.
    """
    version, mount, path = _place(pid, kernel)
    if mount is None:
        return Memory(None, path)
    return _read(kernel, version, mount, path)


def directory_of(pid: int, kernel: KernelFS = LIVE) -> Path | None:
    """Return the directory of a process's memory cgroup, to move others there.

    Args:
        pid: the process.
        kernel: where the kernel's files are read.

    Returns:
        The directory; None where memory is not accounted, and for a process outside of the cgroup
        namespace.

    Raises:
        UsageError: there is no such process.
    """
    _, mount, path = _place(pid, kernel)
    if mount is None:
        return None
    return next((Path(directory) for directory, _ in _directories(mount, path)), None)


def _place(pid: int | None, kernel: KernelFS) -> tuple[int, Mount | None, str]:
    """Return the hierarchy's version and mount, and a process's path in it.  Raises UsageError."""
    text = kernel.read(f"/proc/{'self' if pid is None else pid}/cgroup")
    if text is None:
        raise UsageError(f"there is no process {pid}", "", "Check the number with `ps`")
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths[controller] = path.removesuffix(" (deleted)")  # v2 names no controller
    version, mount = _hierarchy(kernel)
    if mount is None:
        return version, None, paths.get("", "/")
    return version, mount, paths.get("" if version == 2 else "memory", "/")


def of_path(path: str | Path, kernel: KernelFS = LIVE) -> Memory:
    """Return the memory cgroup of a directory.

    Args:
        path: a directory of cgroupfs, or a path below the hierarchy's mount.
        kernel: where the kernel's files are read.

    Returns:
        The cgroup's limits and counts, in bytes.

    Raises:
        UsageError: the path is no cgroup with a memory controller.
    """
    version, mount = _hierarchy(kernel)
    name = str(PurePosixPath("/", path))
    if mount is None:
        raise UsageError(
            f"{path} is not a memory cgroup", "no memory controller is mounted", "", _DOCS
        )
    if name == mount.target or name.startswith(f"{mount.target}/"):
        name = f"/{name[len(mount.target) :].lstrip('/')}"
    if not kernel.exists(f"{mount.target}{name}/cgroup.procs"):
        raise UsageError(
            f"{path} is not a memory cgroup",
            f"there is no {mount.target}{name}",
            f"Name one below {mount.target}",
            _DOCS,
        )
    return _read(kernel, version, mount, str(PurePosixPath(mount.root) / name.lstrip("/")))


def host_memory(kernel: KernelFS = LIVE) -> dict[str, int]:
    """Return what /proc/meminfo says, in bytes.

    Args:
        kernel: where the kernel's files are read.

    Returns:
        Bytes by the kernel's names: MemTotal, MemFree, MemAvailable and so on.
    """
    found = {}
    for line in (kernel.read("/proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def version_2_mount(kernel: KernelFS = LIVE) -> Path:
    """Return where cgroup version 2 is mounted, with a memory controller or without one.

    Args:
        kernel: where the kernel's files are read.

    Returns:
        The mount point; /sys/fs/cgroup if there is none.
    """
    targets = (mount.target for mount in kernel.mounts() if mount.fstype == "cgroup2")
    return Path(next(targets, "/sys/fs/cgroup"))


def unified_mount(kernel: KernelFS = LIVE) -> Path:
    """Return where cgroup version 2 with its memory controller is mounted, or where it would be.

    Args:
        kernel: where the kernel's files are read.

    Returns:
        The mount point; /sys/fs/cgroup if no mount has a memory controller of version 2.
    """
    version, mount = _hierarchy(kernel)
    return Path(mount.target if version == 2 and mount else "/sys/fs/cgroup")


def _hierarchy(kernel: KernelFS) -> tuple[int, Mount | None]:
    """Return version and mount of the hierarchy with the memory controller; None: there is none."""
    mounts = kernel.mounts()
    for mount in mounts:
        if mount.fstype == "cgroup2":
            controllers = kernel.read(f"{mount.target}/cgroup.controllers") or ""
            if "memory" in controllers.split():
                return 2, mount
    for mount in mounts:
        if mount.fstype == "cgroup" and "memory" in mount.options.split(","):
            return 1, mount
    return 0, None


def _read(kernel: KernelFS, version: int, mount: Mount, path: str) -> Memory:
    """Read a cgroup and its ancestors as far as the mount reaches."""
    directories = list(_directories(mount, path))
    read_level = _level_v2 if version == 2 else _level_v1
    levels = (read_level(kernel, directory, name) for directory, name in directories)
    return Memory(version, path, tuple(level for level in levels if level))


def _directories(mount: Mount, path: str) -> Iterator[tuple[str, str]]:
    """Yield directory and path of a cgroup and its ancestors, as far as the mount reaches."""
    name = PurePosixPath(path)
    if ".." in name.parts or not name.is_relative_to(mount.root):
        return  # outside the cgroup namespace, or of what is mounted
    below = name.relative_to(mount.root)
    for group in (below, *below.parents):
        yield os.path.normpath(f"{mount.target}/{group}"), str(PurePosixPath(mount.root) / group)


def _level_v2(kernel: KernelFS, directory: str, name: str) -> Level | None:
    """Read one cgroup of version 2; None where the memory controller is not enabled."""
    used = _number(kernel.read(f"{directory}/memory.current"))
    if used is None:  # the root, or the controller is not enabled here
        return None
    return Level(
        name,
        _number(kernel.read(f"{directory}/memory.max")),
        _number(kernel.read(f"{directory}/memory.high")),
        used,
        _clean(kernel, directory, "", "file_"),
    )


def _level_v1(kernel: KernelFS, directory: str, name: str) -> Level | None:
    """Read one cgroup of version 1; None where it cannot be read."""
    used = _number(kernel.read(f"{directory}/memory.usage_in_bytes"))
    limit = _number(kernel.read(f"{directory}/memory.limit_in_bytes"))
    if used is None:
        return None
    if limit is not None and limit >= _UNLIMITED:
        limit = None
    return Level(name, limit, None, used, _clean(kernel, directory, "total_", "total_"))


def _clean(kernel: KernelFS, directory: str, lists: str, states: str) -> int:
    """Add up pages of files on the reclaim lists, in bytes, less those to be written first."""
    stat = {}
    for line in (kernel.read(f"{directory}/memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        stat[name] = _number(value) or 0
    pages = sum(stat.get(f"{lists}{list_name}_file", 0) for list_name in ("inactive", "active"))
    return max(0, pages - sum(stat.get(f"{states}{state}", 0) for state in ("dirty", "writeback")))


def _number(text: str | None) -> int | None:
    """Read a number of a cgroup file; None for "max" and for a file that is not there."""
    text = (text or "").strip()
    return int(text) if text.isdigit() else None
