# SPDX-License-Identifier: Apache-2.0
"""Give archives contents that depend on their files only: part of tools/dist.py.

setuptools' sdist and Helm's archive of a chart have the time of their making in each member, and
the sdist whoever made it.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path


def normalize(archive: Path, epoch: int) -> None:
    """Write a .tar.gz anew: members in the order of their names, of one time, of user and group 0.

    Args:
        archive: the file, which is replaced.
        epoch: the time, in seconds since 1970.
    """
    packed = io.BytesIO()
    with (
        tarfile.open(archive) as before,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in sorted(before.getmembers(), key=lambda member: member.name):
            member.mtime = epoch
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            # A time with fractions, which would win over mtime.
            member.pax_headers = {}
            after.addfile(member, before.extractfile(member) if member.isfile() else None)
    archive.write_bytes(gzip.compress(packed.getvalue(), 9, mtime=0))
