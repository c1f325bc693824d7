# SPDX-License-Identifier: Apache-2.0
"""What of a model is in the page cache, against what the kernel says of the same ranges."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import pagecache_bpf as pc
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.weights.files import IN_MEMORY
from pagecache_bpf.weights.headers import parse
from tests.unit import weights
from tests.unit.command import run

TENSORS = {"b.weight": (512, 512), "a.weight": (256, 512), "tiny": (3,)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards on a disk, written back and dropped from the page cache."""
    if LIVE.fstype(tmp_path.stat().st_dev) in IN_MEMORY:
        pytest.skip("the temporary directory is in memory (give --basetemp on a disk)")
    for number in (1, 2):
        path = tmp_path / f"model-0000{number}-of-00002.safetensors"
        weights.safetensors(path, {f"{name}.{number}": TENSORS[name] for name in TENSORS})
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return tmp_path


def read(path: Path, offset: int, length: int) -> None:
    """Read a range without readahead."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, length, offset)
    os.close(fd)


def test_files_and_tensors(model: Path) -> None:
    first = sorted(model.glob("*.safetensors"))[0]
    contents = parse(first)
    at = contents.names.index("a.weight.1")
    read(first, int(contents.offsets[at]), int(contents.lengths[at]))
    found = pc.residency(model, tensors=True)
    assert found.tensors["a.weight.1"] == contents.lengths[at]
    for number, name in enumerate(contents.names):
        offset, length = int(contents.offsets[number]), int(contents.lengths[number])
        start = offset // PAGE_SIZE * PAGE_SIZE
        with first.open("rb") as file:
            pages = cached_pages(file.fileno(), start, offset + length - start)
        assert found.tensors[name] == min(length, pages * PAGE_SIZE)
    assert list(found.files) == [str(path) for path in sorted(model.glob("*.safetensors"))]
    assert found.resident_bytes == sum(count or 0 for count in found.files.values())
    assert found.fraction == found.resident_bytes / found.bytes
    assert 0 < found.fraction < 1 or found.fraction == 1
    assert pc.residency(model).tensors == {}


def test_the_command_says_the_same(model: Path) -> None:
    told = run("--json", "residency", str(model), "--tensors")
    assert told.code == 0, told.err
    data = json.loads(told.out)
    assert [item["path"] for item in data["files"]] == sorted(path.name for path in model.iterdir())
    assert {item["name"] for item in data["tensors"]} == {
        f"{name}.{number}" for name in TENSORS for number in (1, 2)
    }
    assert data["bytes"] == sum(path.stat().st_size for path in model.iterdir())
    human = run("residency", str(model))
    assert human.code == 0 and "cached" in human.out


def test_tensors_of_an_unknown_format_are_said_to_be_unknown(model: Path) -> None:
    (model / "legacy.bin").write_bytes(b"\x80\x02" + bytes(8000))
    told = run("--json", "residency", str(model / "legacy.bin"), "--tensors")
    data = json.loads(told.out)
    assert data["tensors"] == [] and "legacy.bin" in data["unknown_tensors"][0]
    assert data["files"][0]["bytes"] == 8002


def test_asking_again_tells_what_has_changed_since(model: Path) -> None:
    before = pc.residency(model)
    first = sorted(model.glob("*.safetensors"))[0]
    read(first, 0, first.stat().st_size)
    after = before.again()
    assert after.files[str(first)] == first.stat().st_size
    assert after.time_ns > before.time_ns and list(after.files) == list(before.files)
    first.rename(first.with_suffix(".moved"))
    with pytest.raises(PagecacheError, match=r"does not exist|cannot be opened"):
        after.again()


def test_what_has_taken_a_files_place_is_not_opened(model: Path) -> None:
    found = pc.residency(model)
    first = sorted(model.glob("*.safetensors"))[0]
    first.unlink()
    os.mkfifo(first)  # to open it for reading would otherwise wait for a writer
    with pytest.raises(PagecacheError, match="not a regular file"):
        found.again()
