# SPDX-License-Identifier: Apache-2.0
"""Archives that are released are the same, whoever made them and when."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tools import archives

EPOCH = 1_700_000_000


def packed(path: Path, names: list[str], mtime: float, user: str) -> Path:
    """A .tar.gz of some members: directories, files and a program."""
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.uname, member.uid = mtime, user, len(user)
            if name.endswith("/"):
                member.type, member.mode = tarfile.DIRTYPE, 0o700
                archive.addfile(member)
                continue
            content = name.encode() * 3
            member.size, member.mode = len(content), 0o775 if name.endswith("run") else 0o664
            archive.addfile(member, io.BytesIO(content))
    return path


def test_archives_of_the_same_files_are_the_same(tmp_path: Path) -> None:
    names = ["p/", "p/b", "p/a", "p/run"]
    one = packed(tmp_path / "one.tar.gz", names, 1e9 + 0.25, "me")
    two = packed(tmp_path / "two.tar.gz", [names[0], *reversed(names[1:])], 1.1e9, "someone")
    assert one.read_bytes() != two.read_bytes()
    for path in (one, two):
        archives.normalize(path, EPOCH)
    assert one.read_bytes() == two.read_bytes()


def test_contents_and_programs_stay(tmp_path: Path) -> None:
    path = packed(tmp_path / "one.tar.gz", ["p/", "p/run", "p/a"], 1e9 + 0.25, "me")
    archives.normalize(path, EPOCH)
    with tarfile.open(path) as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert list(members) == ["p", "p/a", "p/run"]
        assert {name: member.mode for name, member in members.items()} == {
            "p": 0o755,
            "p/a": 0o644,
            "p/run": 0o755,
        }
        assert {member.mtime for member in members.values()} == {EPOCH}
        file = archive.extractfile("p/run")
        assert file and file.read() == b"p/run" * 3
