# SPDX-License-Identifier: Apache-2.0
"""What `make dist` makes: the same files each time, by whatever way a wheel is built."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.delivery.conftest import write_down
from tests.unit.command import ROOT
from tools import dist


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of a directory, by its name."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_tree_gives_the_same_files() -> None:
    if not (dist.OUT / "SHA256SUMS").exists():
        pytest.skip("nothing was built: `make test-delivery` does it")
    before = digests(dist.OUT)
    kinds = (".whl", ".gz", ".deb", ".tar", ".tgz", ".yaml", ".cdx.json")
    assert {kind for kind in kinds if any(name.endswith(kind) for name in before)} == set(kinds)
    for line in (dist.OUT / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert before[name] == digest
    for path in dist.OUT.iterdir():
        if path.is_file():
            write_down(f"bytes of {path.name}", path.stat().st_size)
    subprocess.run([sys.executable, "-m", "tools.dist"], cwd=ROOT, check=True, capture_output=True)
    after = digests(dist.OUT)
    assert {name for name in before if after.get(name) != before[name]} == set()
    assert after.keys() == before.keys()


@pytest.mark.parametrize("way", ["wheel", "sdist"])
def test_each_way_to_build_a_wheel_gives_the_same(way: str, wheel: Path, tmp_path: Path) -> None:
    """`pip wheel .`, and by way of the sdist, which has to have all that a wheel is built from."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(dist.epoch())}
    command = ["pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), "."]
    if way == "sdist":
        command = ["build", "--outdir", str(tmp_path), "."]
        sysroot = ROOT / "build" / "deps"
        if list(sysroot.rglob("libbpf.so.1")):  # an sdist has no build/ of its own
            environment["PAGECACHE_BPF_SYSROOT"] = str(sysroot)
    done = subprocess.run(
        [str(dist.VENV / "bin" / "python"), "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.whl")
    assert made.name == wheel.name
    with zipfile.ZipFile(made) as ours, zipfile.ZipFile(wheel) as theirs:
        contents = [
            {name: archive.read(name) for name in archive.namelist()} for archive in (ours, theirs)
        ]
    assert contents[0].keys() == contents[1].keys()
    assert {name for name in contents[0] if contents[0][name] != contents[1][name]} == set()
