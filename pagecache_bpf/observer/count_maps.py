# SPDX-License-Identifier: Apache-2.0
"""The maps of the observer's programs: what both ways of loading them make."""

from __future__ import annotations

import ctypes

from pagecache_bpf.kernel import abi
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
        *(ctypes.sizeof(abi.pagecache_recorded_value), 1 << 16, 0),
    ),
    "task_states": (_LRU_HASH, 4, 320, 8192, 0),
    "own_processes": (_HASH, 4, 4, 256, _ON_DEMAND),
    "own_changes": (_ARRAY, 4, 8, 1, 0),
    "mappers": (_HASH, 4, 4, 4096, _ON_DEMAND),
    "zeroes": (_ARRAY, 4, 1024, 1, 0),
    "huge_mappings": (_ARRAY, 4, 4, 2, 0),
    "observer_state": (_ARRAY, 4, ctypes.sizeof(abi.pagecache_observer_state), 1, 0),
}
