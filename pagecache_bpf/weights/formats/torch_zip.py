# SPDX-License-Identifier: Apache-2.0
"""PyTorch checkpoints in zip format: every storage is an uncompressed member.

The pickle that names the tensors is not unpickled, which would run what the file says.  Storages
are numbered in the order in which the pickle speaks of them, which is the order in which
torch.load() reads them; PyTorch 1.5 and 1.6 gave them addresses, whose order the pickle has.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights.contents import (
    MAX_TENSORS,
    Contents,
    check_extents,
    damaged,
    no_template,
)
from pagecache_bpf.weights.weight_format import WeightFormat

if TYPE_CHECKING:
    import zipfile

MAX_DIRECTORY = 64 << 20
_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"
_LOCATOR64 = b"PK\x06\x07"
_LOCAL = b"PK\x03\x04"
#: What a pickle begins with (protocol 2 and later): how PyTorch saved before 1.6.
_PICKLE = b"\x80"
#: PyTorch 1.5 and 1.6 called storages by their addresses, later ones number them.
_STORAGE = re.compile(r"(?:.*/)?data/(\d{1,20})")
_NUMBERED = 1 << 31
_MAX_PICKLE = 256 << 20


def parse(path: Path, fd: int, size: int) -> Contents:
    """Read the central directory of a PyTorch checkpoint.

    Args:
        path: the file; for messages only.
        fd: a descriptor of it that is open for reading; its position stays.
        size: bytes of the file.

    Returns:
        The storages by their names ("data/0"), in the order in which torch.load() reads them; they
        have no shapes.

    Raises:
        PagecacheError: the directory is damaged.
        UsageError: it is no zip checkpoint, or one with compressed storages.
        OSError: the file cannot be read.

    Source: torch/serialization.py, persistent_id(); the ZIP file format's APPNOTE.
    """
    import zipfile
    import zlib

    import numpy as np

    if os.pread(fd, 1, 0) == _PICKLE:
        raise no_template(path, "it is one pickle; only PyTorch's zip format says what lies where")
    broken = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError)
    start = _check_directory(path, fd, size)
    with os.fdopen(os.dup(fd), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (*broken, ValueError, OverflowError, EOFError) as error:
            raise damaged(path, f"its directory makes no sense: {error}") from None
    if len(members) > MAX_TENSORS:
        raise damaged(path, f"it would have {len(members):,} members")
    found: dict[int, zipfile.ZipInfo] = {}
    for member in members:
        match = _STORAGE.fullmatch(member.filename)
        if not match:
            continue
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UsageError(
                f"no template can be derived from {path}",
                f"its member {member.filename[:100]!r} is compressed",
                "Save the checkpoint again with torch.save()",
                "docs/troubleshooting.md#no-template-can-be-derived-from",
            )
        if found.setdefault(int(match[1]), member) is not member:
            raise damaged(path, f"it has storage {match[1]} twice")
    if not found:
        raise no_template(path, "it is a zip file without PyTorch's storages (data/0, data/1, ...)")
    order = sorted(found)
    if order[-1] >= _NUMBERED:
        order = _pickled_order(path, fd, size, members, found)
    names, offsets, lengths = [], [], []
    for number in order:
        member = found[number]
        names.append(f"data/{number}")
        offsets.append(_data_offset(path, fd, size, member))
        lengths.append(member.file_size)
    at, many = np.array(offsets, np.int64), np.array(lengths, np.int64)
    check_extents(path, names, at, many, 0, start)
    return Contents(path, size, "torch", names, at, many, start, size - start)


def _pickled_order(
    path: Path,
    fd: int,
    size: int,
    members: list[zipfile.ZipInfo],
    found: dict[int, zipfile.ZipInfo],
) -> list[int]:
    """Return storages in the order in which the pickle speaks of them; nothing is unpickled.

    Source: torch/serialization.py, persistent_id(): ("storage", type, key, location, elements).
    """
    import pickletools

    pickles = [member for member in members if member.filename.endswith("data.pkl")]
    order: dict[int, None] = {}
    if len(pickles) == 1 and pickles[0].file_size <= _MAX_PICKLE:
        start = _data_offset(path, fd, size, pickles[0])
        data = os.pread(fd, pickles[0].file_size, start)
        try:
            for _, value, _ in pickletools.genops(data):
                if isinstance(value, str) and value.isdecimal() and int(value) in found:
                    order.setdefault(int(value))
        except Exception:  # it was no pickle after all: torch would refuse it
            order.clear()
    return [*order, *sorted(found.keys() - order.keys())]


def _check_directory(path: Path, fd: int, size: int) -> int:
    """Return where the central directory begins, if it is small enough to be read.

    Raises PagecacheError.
    """
    tail = os.pread(fd, min(size, (1 << 16) + 22), max(0, size - (1 << 16) - 22))
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise damaged(path, "its directory is missing: it ends too early")
    length, start = struct.unpack_from("<II", tail, at + 12)
    if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR64:
        (where,) = struct.unpack_from("<Q", tail, at - 12)
        record = os.pread(fd, 56, where) if where < size else b""
        if len(record) < 56 or record[:4] != _END64:
            raise damaged(path, "its directory is not where it should be")
        length, start = struct.unpack_from("<QQ", record, 40)
    if start > size or length > size - start:
        raise damaged(path, "its directory lies outside of the file")
    if length > MAX_DIRECTORY or size - start > MAX_DIRECTORY + (1 << 17):
        raise damaged(path, f"its directory would have {length:,} bytes")
    return int(start)


def _data_offset(path: Path, fd: int, size: int, member: zipfile.ZipInfo) -> int:
    """Return where a member's data begins, behind the local header, whose length may vary."""
    if not 0 <= member.header_offset < size:
        raise damaged(path, f"its member {member.filename[:100]!r} lies outside of the file")
    header = os.pread(fd, 30, member.header_offset)
    if len(header) < 30 or header[:4] != _LOCAL:
        raise damaged(path, f"its member {member.filename[:100]!r} is not where it should be")
    name, extra = struct.unpack_from("<HH", header, 26)
    return int(member.header_offset + 30 + name + extra)


FORMATS = (
    WeightFormat(
        "torch",
        ("bin", "pt", "pth", "ckpt"),
        10,
        "a zip checkpoint of PyTorch",
        magic=_LOCAL,
        resembles=lambda start: start.startswith(_PICKLE),
        parse=parse,
    ),
)
