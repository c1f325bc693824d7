# SPDX-License-Identifier: Apache-2.0
"""What the tests of the released files need: clean systems, and those files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivery.chroot import Chroot, can_be_made, clean_system
from tools import dist

PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}


@pytest.fixture(params=sorted(PYTHONS))
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chroot]:
    """A clean Debian 12, then 13."""
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


@pytest.fixture
def wheels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with all that its extras bring, for the Python of the system in use."""
    suite = request.node.callspec.params["system"]
    place = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:"]
    wanted = f"{only(f'pagecache_bpf-{dist.version()}-*.whl')}[all]"
    subprocess.run(
        [*command, "--python-version", PYTHONS[suite], "-d", str(place), wanted], check=True
    )
    return place


def only(pattern: str) -> Path:
    """The one file of build/dist that a pattern means."""
    found = sorted(dist.OUT.glob(pattern))
    if not found:
        pytest.skip(f"there is no build/dist/{pattern}: run `make test-delivery`")
    assert len(found) == 1, found
    return found[0]
