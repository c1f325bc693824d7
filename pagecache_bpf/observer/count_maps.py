# SPDX-License-Identifier: Apache-2.0
"""Maps by file descriptor, whoever made them."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from dataclasses import dataclass

from pagecache_bpf.kernel import abi, libbpf
from pagecache_bpf.kernel.inode_filter import INODE_WORDS, WORD_BYTES

RING = "moves"
BITS_PAGES = 1024
_HASH, _ARRAY, _LRU_HASH = 1, 2, 9  # enum bpf_map_type
_ON_DEMAND = 1  # BPF_F_NO_PREALLOC

#: The maps of bpf/include/observer.bpf.h: type, bytes of a key and of a value, entries, flags.
MAPS: dict[str, tuple[int, int, int, int, int]] = {
    "inode_bits": (_ARRAY, 4, WORD_BYTES, INODE_WORDS, 0),
    "observed_files": (
        *(_HASH, ctypes.sizeof(abi.pagecache_file_key)),
        *(ctypes.sizeof(abi.pagecache_observed_file), 131072, _ON_DEMAND),
    ),
    "page_bits": (_HASH, 8, 4 * BITS_PAGES // 8 + 8, 1 << 18, _ON_DEMAND),
    "seen_bits": (_HASH, 12, BITS_PAGES // 8, 1 << 18, _ON_DEMAND),
    "observed": (
        *(_HASH, ctypes.sizeof(abi.pagecache_observed_key)),
        *(ctypes.sizeof(abi.pagecache_observed_value), 16384, _ON_DEMAND),
    ),
    "recorded": (
        *(_HASH, ctypes.sizeof(abi.pagecache_recorded_key)),
        *(ctypes.sizeof(abi.pagecache_recorded_value), 1 << 16, _ON_DEMAND),
    ),
    "task_states": (_LRU_HASH, 4, 304, 8192, 0),
    "own_processes": (_HASH, 4, 4, 256, _ON_DEMAND),
    "mappers": (_HASH, 4, 4, 4096, _ON_DEMAND),
    "zeroes": (_ARRAY, 4, 1024, 1, 0),
    "any_mappers": (_ARRAY, 4, 4, 1, 0),
    "observer_state": (_ARRAY, 4, ctypes.sizeof(abi.pagecache_observer_state), 1, 0),
}

_BATCH = 4096
_P, _I = ctypes.c_void_p, ctypes.c_int
_PROTOTYPES: dict[str, tuple[type, tuple[type, ...]]] = {
    "bpf_map_get_next_key": (_I, (_I, _P, _P)),
    "bpf_map_lookup_batch": (_I, (_I, _P, _P, _P, _P, _P, _P)),
}


def _function(name: str) -> ctypes._NamedFuncPointer:
    found = getattr(libbpf.library(), name)
    found.restype, found.argtypes = _PROTOTYPES[name]
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Map:
    """A map; sizes are bytes.  Every method raises OSError."""

    fd: int
    key_size: int
    value_size: int

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, None if it is not there."""
        value = ctypes.create_string_buffer(self.value_size)
        if self._call("bpf_map_lookup_elem", key, value):
            return value.raw
        return None

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value of a key."""
        result = libbpf.library().bpf_map_update_elem(self.fd, key, value, 0)
        if result:
            raise OSError(-result, "a map takes no more", str(self.fd))

    def delete(self, key: bytes) -> bool:
        """Forget a key; False if it was not there."""
        return self._call("bpf_map_delete_elem", key)

    def keys(self) -> Iterator[bytes]:
        """Every key; what is added or deleted meanwhile may be met or not."""
        next_key = _function("bpf_map_get_next_key")
        key = ctypes.create_string_buffer(self.key_size)
        before = None
        while True:
            result = next_key(self.fd, before, key)
            if result == -errno.ENOENT:
                return
            if result:
                raise OSError(-result, "a map cannot be read")
            yield key.raw
            before = ctypes.create_string_buffer(key.raw, self.key_size)

    def items(self) -> dict[bytes, bytes]:
        """Keys and values, many a system call where the kernel can (5.6)."""
        lookup = _function("bpf_map_lookup_batch")
        # A batch is whole buckets, so the kernel may ask for more room than there is.
        size, found = _BATCH, dict[bytes, bytes]()
        place, into = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
        first = True
        while True:
            keys = ctypes.create_string_buffer(self.key_size * size)
            values = ctypes.create_string_buffer(self.value_size * size)
            count = ctypes.c_uint32(size)
            start = None if first else place
            result = lookup(self.fd, start, into, keys, values, ctypes.byref(count), None)
            if result == -errno.ENOSPC:
                size *= 2
                continue
            if result not in (0, -errno.ENOENT):
                return self._items_slowly()
            for at in range(count.value):
                key = keys.raw[at * self.key_size : (at + 1) * self.key_size]
                found[key] = values.raw[at * self.value_size : (at + 1) * self.value_size]
            if result:
                return found
            ctypes.memmove(place, into, 8)
            first = False

    def _items_slowly(self) -> dict[bytes, bytes]:
        found = {}
        for key in list(self.keys()):
            value = self.lookup(key)
            if value is not None:
                found[key] = value
        return found

    def _call(self, name: str, *arguments: object) -> bool:
        result = int(getattr(libbpf.library(), name)(self.fd, *arguments))
        if result in (0, -errno.ENOENT):
            return result == 0
        raise OSError(-result, "a map cannot be used")
