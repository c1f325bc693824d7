# SPDX-License-Identifier: Apache-2.0
"""The one wrapper of a BPF map: of a loaded object, by its pin or by its number.

It knows nothing of what the elements mean; keys and values are bytes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from pagecache_bpf.kernel import libbpf
from pagecache_bpf.kernel.file_pages import PAGE_SIZE

_PERCPU_TYPES = (5, 6, 10)  # enum bpf_map_type: PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH
_EXIST = 2  # BPF_EXIST
_BATCH = 4096


def map_id(fd: int) -> int:
    """Return the kernel's number of an open map.

    Args:
        fd: the map's descriptor.

    Returns:
        The number, as `bpftool map` shows it.

    Raises:
        OSError: the descriptor is no map.
    """
    return libbpf.map_info(fd).id


class BpfMap:
    """An open map.  As a context manager it closes the descriptor at the end.

    Args:
        fd: the descriptor of the map.

    Attributes:
        fd: the same.
        key_size, value_size: bytes of a key, and of a value of one CPU.
        entries: how many elements the map has room for.

    Raises:
        OSError: from every method, if the kernel refuses.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = libbpf.map_info(fd)
        self.entries: int = info.max_entries
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self._read_size: int = info.value_size
        if info.type in _PERCPU_TYPES:  # the kernel copies the values of all CPUs
            cpus = int(libbpf.library().libbpf_num_possible_cpus())
            self._read_size = -(-info.value_size // 8) * 8 * cpus

    @classmethod
    def pinned(cls, path: Path) -> BpfMap:
        """Open the map that has a name in bpffs.

        Args:
            path: the name, below a mounted bpffs.

        Returns:
            The map, which the caller closes.

        Raises:
            OSError: there is no such name, it is no map, or the caller is not root.
        """
        return cls(_checked(libbpf.library().bpf_obj_get(os.fsencode(path)), str(path)))

    @classmethod
    def by_id(cls, number: int) -> BpfMap:
        """Open the map that has a number.

        Args:
            number: what map_id() returned, or `bpftool map` shows.

        Returns:
            The map, which the caller closes.

        Raises:
            OSError: there is no such map any more, or the caller is not root.
        """
        return cls(_checked(libbpf.library().bpf_map_get_fd_by_id(number), f"map {number}"))

    def __enter__(self) -> BpfMap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)

    def memory(self, write: bool = False) -> mmap.mmap:
        """Map the memory of an array that was made with BPF_F_MMAPABLE: its elements in a row.

        Args:
            write: whether the memory can be written; what is written, programs see at once.

        Returns:
            The memory, of as many bytes as the elements take, rounded up to whole pages.

        Raises:
            OSError: the map was made without BPF_F_MMAPABLE.
        """
        size = self.entries * -(-self.value_size // 8) * 8
        length = -(-size // PAGE_SIZE) * PAGE_SIZE
        access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        return mmap.mmap(self.fd, length, mmap.MAP_SHARED, access)

    def lookup(self, key: bytes) -> bytes | None:
        """Return the value of a key.

        Args:
            key: as many bytes as the map's keys have.

        Returns:
            The value, or one value for each possible CPU in a per-CPU map; None if the key is
            absent.

        Raises:
            OSError: the kernel refuses the call.
        """
        value = ctypes.create_string_buffer(self._read_size)
        result = libbpf.library().bpf_map_lookup_elem(self.fd, key, value)
        return value.raw if _found(result) else None

    def sum_per_cpu(self, index: int) -> int:
        """Add up the 64-bit numbers that the CPUs have in an element of a per-CPU array.

        Args:
            index: the element's.

        Returns:
            The sum, in the unit of the numbers.

        Raises:
            OSError: the kernel refuses the call.
        """
        raw = self.lookup(index.to_bytes(4, sys.byteorder))
        return sum(array("Q", raw or b""))

    def update(self, key: bytes, value: bytes, existing: bool = False) -> None:
        """Set the value of a key.

        Args:
            key: as many bytes as the map's keys have.
            value: as many bytes as its values have.
            existing: only if the key is there; without it the key is added where it is absent.

        Raises:
            OSError: the map is full, or the key is absent and `existing` is set (ENOENT).
        """
        flags = _EXIST if existing else 0
        result = libbpf.library().bpf_map_update_elem(self.fd, key, value, flags)
        _checked(result, "a map takes no more")

    def delete(self, key: bytes) -> bool:
        """Remove a key.

        Args:
            key: as many bytes as the map's keys have.

        Returns:
            False if the key was absent.

        Raises:
            OSError: the kernel refuses the call.
        """
        return _found(libbpf.library().bpf_map_delete_elem(self.fd, key))

    def keys(self) -> Iterator[bytes]:
        """Yield every key; what is added or removed meanwhile may be met or not.

        Yields:
            Keys, in the kernel's order.

        Raises:
            OSError: the kernel refuses the call.
        """
        next_key = libbpf.library().bpf_map_get_next_key
        key = ctypes.create_string_buffer(self.key_size)
        before = None
        while _found(next_key(self.fd, before, key)):
            yield key.raw
            before = ctypes.create_string_buffer(key.raw, self.key_size)

    def items(self) -> dict[bytes, bytes]:
        """Return keys and values, many by one system call where the kernel can (Linux 5.6).

        Returns:
            Values by their keys; of a per-CPU map, one value for each possible CPU after the other.

        Raises:
            OSError: the kernel refuses the call.
        """
        lookup = libbpf.library().bpf_map_lookup_batch
        # A batch is whole buckets, so the kernel may ask for more room than there is.
        size, found = _BATCH, dict[bytes, bytes]()
        position, after = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
        first = True
        while True:
            keys = ctypes.create_string_buffer(self.key_size * size)
            values = ctypes.create_string_buffer(self.value_size * size)
            count = ctypes.c_uint32(size)
            start = None if first else position
            result = lookup(self.fd, start, after, keys, values, ctypes.byref(count), None)
            if result == -errno.ENOSPC:
                size *= 2
                continue
            if result not in (0, -errno.ENOENT):
                return self._items_one_by_one()
            # What was filled is copied once; .raw would copy all of the room for each element.
            all_keys = ctypes.string_at(keys, count.value * self.key_size)
            all_values = ctypes.string_at(values, count.value * self.value_size)
            for at in range(count.value):
                key = all_keys[at * self.key_size : (at + 1) * self.key_size]
                found[key] = all_values[at * self.value_size : (at + 1) * self.value_size]
            if result:
                return found
            ctypes.memmove(position, after, 8)
            first = False

    def _items_one_by_one(self) -> dict[bytes, bytes]:
        """Return what items() does, on kernels that take no batches of this type of map."""
        found = {}
        for key in list(self.keys()):
            value = self.lookup(key)
            if value is not None:
                found[key] = value
        return found


def close_all(maps: Mapping[str, BpfMap]) -> None:
    """Close several maps.

    Args:
        maps: open maps by any names.
    """
    for opened in maps.values():
        opened.close()


def _found(result: int) -> bool:
    """Tell whether a key was there, by a result of libbpf; raises OSError for other errors."""
    if result == -errno.ENOENT:
        return False
    _checked(result, "a map cannot be used")
    return True


def _checked(result: int, what: str) -> int:
    """Return a result of libbpf, which reports failure by a negative errno.  Raises OSError."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
    return result
