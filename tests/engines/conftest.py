# SPDX-License-Identifier: Apache-2.0
"""What each start of an engine needs: a disk that reads ahead as most do, and a controller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.controllers import running
from tests.native.readahead import usual_readahead
from tests.unit.command import ROOT

PLACE = ROOT / "build" / "models" / "engines"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """The models' directory, on a disk whose read_ahead_kb is 128."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with usual_readahead(PLACE):
        yield PLACE


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of `pagecache-bpf serve` in a container; in a process where podman is missing."""
    with running(tmp_path_factory.mktemp("controller")) as socket:
        yield socket
