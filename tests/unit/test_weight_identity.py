# SPDX-License-Identifier: Apache-2.0
"""By what a file is known again: the SHA-256 of a part of it, or of its start and its end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagecache_bpf.weights.identity import identify

EDGE = 64 << 10
SIZE = (3 << 20) + 17


@pytest.fixture
def data() -> bytes:
    return hashlib.shake_128(b"weights").digest(SIZE)


@pytest.fixture
def fd(tmp_path: Path, data: bytes) -> Iterator[int]:
    (tmp_path / "w").write_bytes(data)
    opened = os.open(tmp_path / "w", os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (5, 2 << 20), (SIZE - 3, 3)])
def test_a_part(fd: int, data: bytes, start: int, length: int) -> None:
    expected = hashlib.sha256(data[start : start + length]).hexdigest()
    assert identify(fd, SIZE, start, length) == expected
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0


@pytest.mark.parametrize("size", [1, EDGE, EDGE + 1, 2 * EDGE - 1, 2 * EDGE, SIZE])
def test_start_and_end_of_a_file_count_once(fd: int, data: bytes, size: int) -> None:
    """Where they meet, no byte is hashed twice."""
    edges = data[: min(size, EDGE)] + data[max(EDGE, size - EDGE) : size]
    assert identify(fd, size, 0, 0) == hashlib.sha256(edges).hexdigest()


def test_a_file_that_has_shrunk(fd: int, tmp_path: Path) -> None:
    os.truncate(tmp_path / "w", 100)
    with pytest.raises(EOFError):
        identify(fd, SIZE, 0, 0)
    with pytest.raises(EOFError):
        identify(fd, SIZE, 0, 101)
