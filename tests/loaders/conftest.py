# SPDX-License-Identifier: Apache-2.0
"""A cold disk whose reads are traced, two ranks of vLLM, and what was read written down."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loaders.page_trace import PageTrace, cold_disk
from tests.loaders.vllm_ranks import Ranks

_DISK_BYTES = 1 << 30
_RESULTS = Path("build/test")


@pytest.fixture(scope="session", autouse=True)
def results() -> None:
    """There is a place for what was read, in a fresh clone too."""
    _RESULTS.mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory in memory: no other disk takes part."""
    if os.geteuid() != 0:
        pytest.skip("mounting and tracing need root")
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def disk(scratch: Path) -> Iterator[Path]:
    with cold_disk(scratch, _DISK_BYTES) as mount:
        yield mount


@pytest.fixture(scope="session")
def trace(disk: Path, scratch: Path) -> Iterator[PageTrace]:
    with PageTrace(disk, scratch) as traced:
        yield traced


@pytest.fixture(scope="session")
def ranks(disk: Path) -> Iterator[Callable[[int], Ranks]]:
    """Starts so many ranks of vLLM when they are first asked for."""
    started: dict[int, Ranks] = {}

    def start(count: int) -> Ranks:
        if count not in started:
            started[count] = Ranks(count, _RESULTS / f"vllm-{count}.log")
        return started[count]

    yield start
    for some in started.values():
        some.close()


class Reads(dict[str, Any]):
    """What was read, by case; each is in build/test/loader_reads.json at once."""

    def __setitem__(self, name: str, case: dict[str, Any]) -> None:
        super().__setitem__(name, case)
        lines = (f"{json.dumps(name)}: {json.dumps(case)}" for name, case in self.items())
        (_RESULTS / "loader_reads.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.fixture(scope="session")
def reads() -> Reads:
    return Reads()
