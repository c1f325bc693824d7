# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that the tests of benchmarks measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checkpoints
from benchmarks.cachestat import NotCold, drop
from benchmarks.directio import read_whole
from pagecache_bpf.errors import UnsupportedError
from pagecache_bpf.weights.models import Model


def measurable(directory: Path, size: int) -> Model:
    """Make a checkpoint of two shards whose pages can be evicted and read directly, or skip."""
    made = checkpoints.generate(directory / "llama", size, shards=2)
    try:
        drop(made.files)
        read_whole(made.files[0])
    except (NotCold, UnsupportedError) as error:
        pytest.skip(f"{directory} cannot be measured: {error}")
    return made
