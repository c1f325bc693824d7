# SPDX-License-Identifier: Apache-2.0
"""What the kernel knows of a file without asking its file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagecache_bpf.kernel.file_pages import known_status


def test_it_is_what_stat_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(12347))
    with path.open("rb") as file:
        told, status = known_status(file.fileno()), os.fstat(file.fileno())
    assert told == (status.st_uid, 12347, os.major(status.st_dev))
    with pytest.raises(OSError, match="Bad file descriptor"):
        known_status(-1)
