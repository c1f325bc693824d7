# SPDX-License-Identifier: Apache-2.0
"""Maps of attached policies: opened by their pin or their number, and mapped into memory."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pagecache_bpf.kernel import libbpf


def map_id(fd: int) -> int:
    """The kernel's number of an open map.  Raises OSError."""
    return libbpf.map_info(fd).id


class MapFile:
    """An open map.  Use it as a context manager.  Raises OSError."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = libbpf.map_info(fd)
        self.entries: int = info.max_entries
        self.value_size: int = info.value_size

    @classmethod
    def pinned(cls, path: Path) -> MapFile:
        """The map of that name in bpffs."""
        return cls(_checked(libbpf.library().bpf_obj_get(os.fsencode(path)), str(path)))

    @classmethod
    def by_id(cls, number: int) -> MapFile:
        """The map of that number."""
        return cls(_checked(libbpf.library().bpf_map_get_fd_by_id(number), f"map {number}"))

    def __enter__(self) -> MapFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)

    def memory(self, write: bool = False) -> mmap.mmap:
        """The elements of an array with BPF_F_MMAPABLE, one after the other."""
        size = self.entries * -(-self.value_size // 8) * 8
        length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        return mmap.mmap(self.fd, length, mmap.MAP_SHARED, access)

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value of a key."""
        _checked(libbpf.library().bpf_map_update_elem(self.fd, key, value, 0), "a map")


def close_all(maps: Mapping[str, MapFile]) -> None:
    """Close several."""
    for each in maps.values():
        each.close()


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = -result if result != -1 else errno.EINVAL
        raise OSError(code, os.strerror(code), what)
    return result
