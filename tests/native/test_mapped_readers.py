# SPDX-License-Identifier: Apache-2.0
"""Readers of a mapping, as engine agent's events tell of them, are followed by both policies.

Of a large folio a fault can map all and tells of one page, a huge page is mapped by one fault, and
memcpy() goes through a tensor from its end, or touches its end first.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.cachestat import drop
from tests.native.readahead import device_speed, usual_readahead
from tests.native.test_record import _nothing_attached  # noqa: F401  # a fixture
from tests.unit import weights
from tests.unit.command import run

pytestmark = pytest.mark.native

#: Tensors that begin and end anywhere in a huge page, as those of checkpoints do.
TENSORS = (58_000_000, 2048, *(6_880_000, 6_880_000, 6_880_000, 480_256, 1_968_128) * 6)

TOUCHED = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
    for at in range(0, len(mapping), 4096):
        mapping[at]
"""
COPIED = """
import sys
from safetensors import safe_open
for path in sys.argv[1:]:
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():
            file.get_tensor(name)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the package safetensors wrote."""
    path = tmp_path_factory.mktemp("mapped") / "model.safetensors"
    return weights.noise(path, TENSORS, seed=3)


@pytest.mark.parametrize("reader", [TOUCHED, COPIED], ids=["touched", "copied"])
@pytest.mark.parametrize("policy", ["sequential", "maio"])
def test_a_mapped_reader_is_read_ahead_of_in_large_pieces(
    checkpoint: Path, policy: str, reader: str
) -> None:
    """Once it has begun: it is found in the middle, where the kernel reads in large folios."""
    with usual_readahead(checkpoint), device_speed(checkpoint, 40 << 30):
        attached = run("attach", policy, "--engine", "agent", checkpoint)
        assert attached.code == 0, attached.err
        drop([checkpoint])
        command = (sys.executable, "-c", reader, checkpoint)
        subprocess.run(command, check=True, timeout=120)
        (shown,) = run("status", "--json").data["policies"]
    size = checkpoint.stat().st_size
    asked, calls = (shown["counters"][name] for name in ("prefetch_bytes", "prefetch_calls"))
    # More than once is asked for where the reader has turned round; the pages are there then.
    assert 0.7 * size < asked < {"sequential": 1.6, "maio": 1.25}[policy] * size
    assert calls < size / (2 << 20), f"{calls} requests for {asked} of {size} bytes"


@pytest.mark.parametrize("policy", ["sequential", "maio"])
def test_shards_that_the_device_reads_in_an_instant_are_left_alone(
    tmp_path: Path, policy: str
) -> None:
    """Each is over before a request has come to it, and one extent of the template."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shards = [
        weights.noise(folder / f"model-{number:05}-of-00024.safetensors", (400_000,) * 3, number)
        for number in range(1, 25)
    ]
    with usual_readahead(folder), device_speed(folder, 40 << 30):
        attached = run("attach", policy, "--engine", "agent", folder)
        assert attached.code == 0, attached.err
        drop(shards)
        for path in shards:
            subprocess.run((sys.executable, "-c", TOUCHED, path), check=True, timeout=120)
        (shown,) = run("status", "--json").data["policies"]
    assert shown["counters"]["prefetch_calls"] == 0, shown["counters"]
    assert shown["gauges"]["short_files"] == 1


def test_a_model_that_was_dropped_is_read_ahead_of_again(tmp_path: Path) -> None:
    """What an earlier load has asked for is not counted on, in any of its shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    shards = [
        weights.noise(folder / f"model-{number:05}-of-00004.safetensors", (8_000_000,) * 5, number)
        for number in range(1, 5)
    ]
    size = sum(path.stat().st_size for path in shards)
    with usual_readahead(folder), device_speed(folder, 10 << 30):
        attached = run("attach", "maio", "--engine", "agent", folder)
        assert attached.code == 0, attached.err
        asked = [0]
        for _ in range(3):
            drop(shards)
            subprocess.run((sys.executable, "-c", COPIED, *shards), check=True, timeout=120)
            (shown,) = run("status", "--json").data["policies"]
            asked.append(shown["counters"]["prefetch_bytes"])
    for before, after in pairwise(asked):
        assert 0.7 * size < after - before < 1.25 * size, asked
