# SPDX-License-Identifier: Apache-2.0
"""What of a model is in the page cache, against what the kernel says of the same ranges."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pagecache_bpf as pc
from pagecache_bpf import api
from pagecache_bpf.errors import PagecacheError, PrivilegeError
from pagecache_bpf.explain import model_residency
from pagecache_bpf.kernel.cachestat import cached_pages
from pagecache_bpf.kernel.file_pages import PAGE_SIZE
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.weights.files import IN_MEMORY
from pagecache_bpf.weights.headers import parse
from pagecache_bpf.weights.models import resolve
from tests.unit import weights
from tests.unit.command import run
from tests.unit.weights import read_without_readahead

NOBODY = 65534
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


def test_files_and_tensors(model: Path) -> None:
    first = sorted(model.glob("*.safetensors"))[0]
    contents = parse(first)
    at = contents.names.index("a.weight.1")
    read_without_readahead(first, int(contents.offsets[at]), int(contents.lengths[at]))
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
    read_without_readahead(first, 0, first.stat().st_size)
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


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A directory that every user may look into, on a disk."""
    if os.geteuid() != 0:
        pytest.skip("being another user takes root")
    with tempfile.TemporaryDirectory() as made:
        path = Path(made)
        if LIVE.fstype(path.stat().st_dev) in IN_MEMORY:
            pytest.skip("the temporary directory is in memory (give TMPDIR on a disk)")
        path.chmod(0o755)
        yield path


@contextmanager
def as_nobody() -> Iterator[None]:
    """Have the rights of a user who is nobody in particular."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_owner_is_told_and_others_are_not(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_controller_says", lambda path: None)
    for owner in (NOBODY, 0):
        path = theirs / f"{owner}.safetensors"
        weights.safetensors(path, TENSORS)
        os.chown(path, owner, owner)
    with as_nobody():
        own = pc.residency(theirs / f"{NOBODY}.safetensors", tensors=True)
        others = pc.residency(theirs / "0.safetensors", tensors=True)
        assert own.resident_bytes == own.bytes and own.fraction == 1
        assert set(own.tensors) == set(TENSORS) and None not in own.tensors.values()
        assert others.bytes == own.bytes and others.fraction is None
        assert others.resident_bytes is None and set(others.tensors.values()) == {None}
    assert pc.residency(theirs / "0.safetensors").fraction == 1


def test_a_shard_that_may_not_be_read_is_named_whichever_it_is(theirs: Path) -> None:
    for number in (1, 2):
        weights.safetensors(theirs / f"model-0000{number}-of-00002.safetensors", TENSORS)
    (theirs / "model-00002-of-00002.safetensors").chmod(0o600)
    ways: tuple[Callable[[Path], object], ...] = (resolve, pc.residency)
    for way in ways:
        with as_nobody(), pytest.raises(PrivilegeError, match="model-00002-of-00002"):
            way(theirs)


def test_the_kernel_is_asked_before_the_controller(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def says(path: Path) -> int:
        asked.append(path)
        return 4096

    monkeypatch.setattr(api, "_controller_says", says)
    found = pc.residency(model)
    assert not asked
    monkeypatch.setattr(model_residency, "resident_pages_or_none", lambda fd: None)
    assert found.again().resident_bytes == 2 * 4096
    assert asked == sorted(model.glob("*.safetensors"))
