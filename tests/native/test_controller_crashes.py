# SPDX-License-Identifier: Apache-2.0
"""A few cells of tests/controller_crashes.py: a process is killed at a step of a load."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.controller_crashes import CONFIG, crash, make_weights
from tests.native.controller import serving

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="controller-crashes-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_what_is_killed_leaves_nothing(place: Path) -> None:
    """Neither loads nor tags nor connections, and others are served with the right bytes."""
    make_weights(place / "w.safetensors")
    with serving(place / "run", CONFIG) as controller:
        for process, step in (
            ("client", "open"),
            ("client", "done"),
            ("inspector", "open"),
            ("worker", "middle"),
            ("controller", "middle"),
        ):
            crash(place, controller, process, step)
