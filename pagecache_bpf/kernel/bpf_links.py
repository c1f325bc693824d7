# SPDX-License-Identifier: Apache-2.0
"""Pinned links of struct_ops maps: another map is put in the place of the attached one."""

from __future__ import annotations

import os
from pathlib import Path

from pagecache_bpf.kernel.libbpf import open_pinned
from pagecache_bpf.kernel.libbpf_library import library


def update_pinned(path: Path, table: int) -> None:
    """Let a pinned link attach another struct_ops map, without a moment between the two.

    Args:
        path: the link's name in bpffs.
        table: descriptor of the map.  The kernel takes it only when its programs are ready, as they
            are after ObjectMap.attach_struct_ops() was tried.

    Raises:
        OSError: the kernel refuses, and nothing has changed; or there is no such link.
    """
    link = open_pinned(path)
    try:
        result = library().bpf_link_update(link, table, None)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
    finally:
        os.close(link)
