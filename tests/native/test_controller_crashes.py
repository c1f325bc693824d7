# SPDX-License-Identifier: Apache-2.0
"""Cells of tests/controller_crashes.py: a process is killed at a step of a load.

Each process is killed, each step is met, and the controller dies at the calls that change the most;
PAGECACHE_BPF_CRASHES=all has every process killed at every step, and the controller at every call.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.controller_crashes import (
    CONFIG,
    INSIDE,
    PROCESSES,
    STEPS,
    crash,
    crash_inside,
    make_weights,
)
from tests.native.controller import serving

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root")

EVERY = os.environ.get("PAGECACHE_BPF_CRASHES") == "all"
CELLS = (
    ("client", "answer"),
    ("inspector", "ask"),
    ("client", "files"),
    ("worker", "middle"),
    ("client", "done"),
    ("inspector", "hello"),
    ("worker", "close"),
    ("client", "connect"),
    ("client", "first read"),
)
CALLS = ("LoadLedger.place", "LoadTemplates.give", "EngineControl.untag")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that every user can reach, with weights."""
    with tempfile.TemporaryDirectory(prefix="controller-crashes-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        make_weights(Path(name) / "w.safetensors")
        yield Path(name)


def test_what_is_killed_leaves_nothing(place: Path) -> None:
    """Neither loads nor tags nor connections, and others are served with the right bytes."""
    others = [process for process in PROCESSES if process != "controller"]
    cells = list(product(others, STEPS)) if EVERY else list(CELLS)
    assert {step for _, step in cells} == set(STEPS)
    with serving(place / "run", CONFIG) as controller:
        for process, step in cells:
            crash(place, controller, process, step)


@pytest.mark.parametrize("step", STEPS if EVERY else ("answer",))
def test_a_controller_that_is_killed_before_a_step_leaves_nothing(place: Path, step: str) -> None:
    """Its helpers end, the next controller finds neither loads nor tags and serves."""
    with serving(place / f"run-{step}", CONFIG) as controller:
        crash(place, controller, "controller", step)


@pytest.mark.parametrize("call", INSIDE if EVERY else CALLS)
def test_a_controller_that_is_killed_within_a_request_leaves_nothing(
    place: Path, call: str
) -> None:
    """The same in the middle of a request."""
    crash_inside(place, place / f"run-{call}", call)
