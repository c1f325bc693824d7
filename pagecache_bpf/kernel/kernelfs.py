# SPDX-License-Identifier: Apache-2.0
"""The one place where the package reads kernel files (procfs, sysfs, cgroupfs).

Everything goes through a KernelFS so that tests can put a directory in the kernel's place
and so that one debug line says what was asked (`-vv` on the command line shows them).  What is kept
open or written (pagemap, pressure triggers, oom_score_adj) is opened by its own module at path().
Not here: the descriptors of this process below /proc/self/fd (kernel/file_key.py), and bpffs, whose
files are opened by bpf(2).
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mount:
    """One mount, as a line of /proc/self/mountinfo tells it.

    Attributes:
        device: number of the file system's device, as st_dev of its files.
        target: where it is mounted.
        fstype: the type of the file system.
        root: which directory of the file system is mounted.
        options: those of the file system, separated by commas.

    Source: Documentation/filesystems/proc.rst, /proc/<pid>/mountinfo.
    """

    device: int
    target: str
    fstype: str
    root: str = "/"
    options: str = ""


@dataclass(frozen=True)
class KernelFS:
    """Reads below root, which is "/" except in tests.

    No method but stat() raises for a file that is absent or may not be read: None or an empty
    answer is what a probe can work with, and each caller says what it concludes from that.
    """

    root: Path = Path("/")

    def path(self, name: str) -> Path:
        """Return where a kernel file is looked for.

        Args:
            name: its absolute path on a live system.

        Returns:
            The path below this tree's root.
        """
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Tell whether a kernel file is there.

        Args:
            name: its absolute path on a live system.

        Returns:
            False also when its directory may not be searched.
        """
        found = os.path.exists(self.path(name))
        _log.debug("exists %s: %s", name, found)
        return found

    def stat(self, name: str) -> os.stat_result:
        """Return what identifies a kernel file, such as a namespace or a control group.

        Args:
            name: its absolute path on a live system; a link is followed.

        Returns:
            The answer of stat(2).

        Raises:
            OSError: it is absent, or may not be looked at.
        """
        found = os.stat(self.path(name))
        _log.debug("stat %s: inode %d", name, found.st_ino)
        return found

    def read(self, name: str) -> str | None:
        """Return the text of a kernel file.

        Args:
            name: its absolute path on a live system.

        Returns:
            The text without the final newline, None when it cannot be read.
        """
        data = self.read_bytes(name)
        return None if data is None else data.decode(errors="replace").rstrip("\n")

    def read_bytes(self, name: str) -> bytes | None:
        """Return the content of a kernel file.

        Args:
            name: its absolute path on a live system.

        Returns:
            The bytes, None when it cannot be read.
        """
        try:
            data = self.path(name).read_bytes()
        except OSError as error:
            _log.debug("read %s: %s", name, error.strerror)
            return None
        _log.debug("read %s: %d bytes", name, len(data))
        return data

    def entries(self, name: str) -> list[str]:
        """Return the names in a directory of kernel files.

        Args:
            name: its absolute path on a live system.

        Returns:
            The names, sorted; none when it cannot be listed.
        """
        try:
            names = sorted(os.listdir(self.path(name)))
        except OSError as error:
            _log.debug("list %s: %s", name, error.strerror)
            return []
        _log.debug("list %s: %d entries", name, len(names))
        return names

    def mounts(self) -> list[Mount]:
        """Return the mounts that this process sees.

        Returns:
            The mounts, in the order in which they were made.
        """
        found = []
        for line in (self.read("/proc/self/mountinfo") or "").splitlines():
            # 36 35 98:0 /root /target options [optional fields] - fstype source options
            head, separator, tail = line.partition(" - ")
            fields = head.split()
            if not separator or len(fields) < 5 or not tail:
                continue
            major, _, minor = fields[2].partition(":")
            # octal: a space is \040
            root, target = (field.encode().decode("unicode_escape") for field in fields[3:5])
            fstype, *rest = tail.split()
            device = os.makedev(int(major), int(minor))
            found.append(Mount(device, target, fstype, root, rest[-1] if rest else ""))
        return found

    def fstype(self, device: int) -> str | None:
        """Return the type of the file system that a device number belongs to.

        Args:
            device: st_dev of a file.

        Returns:
            The type, such as "ext4"; None when unknown, as for file systems with several anonymous
            devices (subvolumes of btrfs).
        """
        for mount in self.mounts():
            if mount.device == device:
                return mount.fstype
        return None


#: The kernel this process runs on.
LIVE = KernelFS()


#: Types of file systems without a block device of their own that ask no server either.
_LOCAL = frozenset({"btrfs", "overlay", "tmpfs", "ramfs", "zfs", "bcachefs"})
_MOUNTS_SECONDS = 5


def asks_server(path: str) -> bool:
    """Tell whether the file system at a path asks a server, which may not answer.

    It is told by the mounts of this process, which are read every few seconds; the path itself is
    not looked at.

    Args:
        path: absolute, with symbolic links resolved.

    Returns:
        Whether it is on FUSE, NFS or another file system without a device that is not known to be
        local.
    """
    around = [
        mount
        for mount in _mounts_at(int(time.monotonic() / _MOUNTS_SECONDS))
        if f"{path}/".startswith(f"{mount.target.rstrip('/')}/")
    ]
    deepest = max(around, key=lambda mount: len(mount.target), default=None)
    return deepest is not None and os.major(deepest.device) == 0 and deepest.fstype not in _LOCAL


@lru_cache(maxsize=1)
def _mounts_at(moment: int) -> list[Mount]:
    """Read the mounts, once for each moment."""
    return LIVE.mounts()
