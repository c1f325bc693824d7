# SPDX-License-Identifier: Apache-2.0
"""What the tests of the released files need: clean systems, and those files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.delivery.chroot import Chroot, can_be_made, clean_system
from tests.native.readahead import usual_readahead
from tests.unit.command import ROOT
from tools import dist

#: Debian 12, 13 and testing, with their own Python.
PYTHONS = {"bookworm": "3.11", "trixie": "3.13", "forky": "3.14"}
#: The model of on_a_disk(), and the bytes of its one tensor.
MODEL, SIZE = "model.safetensors", 48 << 20
RELEASES = ("bookworm", "trixie")


@pytest.fixture(params=RELEASES)
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chroot]:
    """A clean system: Debian 12, then 13, where a test does not name others."""
    if reason := can_be_made():
        pytest.skip(reason)
    with clean_system(request.param, tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel of build/dist."""
    return only(f"pagecache_bpf-{dist.version()}-*.whl")


@pytest.fixture(scope="session")
def debs() -> list[Path]:
    """The packages of build/dist: pagecache-bpf and pagecache-bpf-dkms."""
    return [only(f"pagecache-bpf_{dist.version()}_*.deb"), only("pagecache-bpf-dkms_*_all.deb")]


@pytest.fixture(scope="session")
def wheels(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The wheel with all that its extras bring, for a version of Python: a folder of wheels."""

    def collect(python: str) -> Path:
        place = tmp_path_factory.getbasetemp() / f"wheels-{python}"
        if not place.exists():
            # What a requirement's marker says is judged for the Python that runs pip.
            own = interpreter(python) or sys.executable
            command = [own, "-m", "pip", "download", "-q", "--only-binary=:all:"]
            command += ["--python-version", python, "-d", str(place), f"{wheel}[all]"]
            subprocess.run(command, check=True)
        return place

    return collect


@contextmanager
def on_a_disk() -> Iterator[Path]:
    """A directory of this machine's own disk, which reads ahead as most do, with a model in it.

    The root of a clean system is an overlay over a tmpfs.
    """
    place = ROOT / "build" / "test" / "delivery"
    place.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}})
    with (place / MODEL).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode() + bytes(SIZE))
    try:
        with usual_readahead(place / MODEL):
            yield place
    finally:
        shutil.rmtree(place)


def interpreter(version: str) -> str | None:
    """A Python of this version that runs here, in PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    named = shutil.which(f"python{version}")
    for path in [*([named] if named else []), *sorted(pyenv.glob(f"{version}.*/bin/python3"))]:
        # Not the name that was found: it may be a script that chooses one.
        ask = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        done = subprocess.run([str(path), "-c", ask], capture_output=True, text=True)
        found, _, executable = done.stdout.strip().partition(" ")
        if found == version:
            return executable
    return None


def write_down(name: str, figure: float) -> None:
    """Keep a figure in build/test/delivery.json: what was seen on this machine, not a limit."""
    file = ROOT / "build" / "test" / "delivery.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**told, name: figure}, indent=1, sort_keys=True) + "\n")


def only(pattern: str) -> Path:
    """The one file of build/dist that a pattern means."""
    found = sorted(dist.OUT.glob(pattern))
    if not found:
        pytest.skip(f"there is no build/dist/{pattern}: run `make test-delivery`")
    assert len(found) == 1, found
    return found[0]
