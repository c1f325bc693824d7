# SPDX-License-Identifier: Apache-2.0
"""Files that the agent governs: how the programs know them, and how they are opened for work."""

from __future__ import annotations

import array
import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pagecache_bpf import _abi
from pagecache_bpf.agent.executor import Source
from pagecache_bpf.cachestat import cached_pages

_FS_IOC_GETVERSION = 0x80087601  # _IOR('v', 1, long)


@dataclass
class FileTag:
    """A governed file; model_id is its model's number, path is for people."""

    key: bytes
    dev_major: int
    dev_minor: int
    ino: int
    generation: int
    model: str
    model_id: int
    path: str
    source: Source

    @property
    def device(self) -> str:
        """The device, MAJOR:MINOR."""
        return f"{self.dev_major}:{self.dev_minor}"

    def resident_pages(self) -> int:
        """Pages of it in the cache now; 0 for a file that is gone."""
        try:
            fd = self.source.acquire()
        except OSError:
            return 0
        try:
            return cached_pages(fd)
        finally:
            self.source.release()

    def size_bytes(self) -> int:
        """Its size now; 0 for a file that is gone."""
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0

    def as_json(self) -> dict[str, Any]:
        """As the agent's socket tells it."""
        names = ("dev_major", "dev_minor", "ino", "generation", "model", "model_id", "path")
        return {
            **{name: getattr(self, name) for name in names},
            "resident_pages": self.resident_pages(),
        }


def key_of(fd: int) -> bytes:
    """How the programs know a file: device, inode number and generation.  Raises OSError."""
    status = os.fstat(fd)
    version = array.array("L", [0])
    with suppress(OSError):
        fcntl.ioctl(fd, _FS_IOC_GETVERSION, version)
    return bytes(
        _abi.pagecache_file_key(
            ino=status.st_ino,
            dev_major=os.major(status.st_dev),
            dev_minor=os.minor(status.st_dev),
            generation=version[0] & 0xFFFFFFFF,
        )
    )
