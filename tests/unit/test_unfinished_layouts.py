# SPDX-License-Identifier: Apache-2.0
"""Pointers, downloads in progress, missing shards and foreign files are named as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagecache_bpf.errors import UsageError
from pagecache_bpf.weights.models import resolve
from tests.unit.layouts import POINTER, SAFE, SHARDS, hub, tree

POINTERS = {
    "extended": POINTER.replace("oid", f"ext-0-filter sha256:{'1' * 64}\noid"),
    "of Windows": POINTER.replace("\n", "\r\n"),
    "of the first year": POINTER.replace("git-lfs.github", "hawser.github"),
    "cut": POINTER.rstrip("\n"),
}


@pytest.mark.parametrize("kind", POINTERS)
@pytest.mark.parametrize("name", ["model.safetensors", SAFE])
def test_pointers_of_every_kind(disk: Path, kind: str, name: str) -> None:
    """Indexes are large files, too."""
    (disk / "m").mkdir()
    tree(disk / "m", "model-00001-of-00001.safetensors")
    (disk / "m" / name).write_bytes(POINTERS[kind].format("0" * 64).encode())
    if name != SAFE:
        (disk / "m" / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UsageError, match=rf"{name} is a Git LFS pointer.*4,976,698,672"):
        resolve(disk / "m")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "x-00001-of-00001.gguf", "pytorch_model.bin"]
)
def test_a_git_lfs_pointer(disk: Path, name: str) -> None:
    (disk / name).write_text(POINTER.format("0" * 64))
    for way in (disk, disk / name):
        with pytest.raises(UsageError, match=r"is a Git LFS pointer.*git lfs pull") as caught:
            resolve(way)
        assert "4,976,698,672" in caught.value.why


@pytest.mark.parametrize("linked", [False, True])
def test_one_shard_that_is_none_among_others(disk: Path, linked: bool) -> None:
    """Of files of one file system less is asked after the first: never so little as to miss it."""
    (disk / "blobs").mkdir()
    blobs = []
    for number, name in enumerate(SHARDS):
        blobs.append(disk / "blobs" / str(number) if linked else disk / name)
        blobs[-1].write_bytes(bytes(4096))
        if linked:
            (disk / name).symlink_to(f"blobs/{number}")
    tree(disk, index={SAFE: SHARDS})
    assert [path.name for path in resolve(disk).files] == [path.name for path in blobs]
    blobs[7].write_text(POINTER.format("0" * 64))
    with pytest.raises(UsageError, match=rf"{SHARDS[7]} is a Git LFS pointer"):
        resolve(disk)
    blobs[7].write_bytes(b"")
    with pytest.raises(UsageError, match=rf"{SHARDS[7]} is empty"):
        resolve(disk)
    blobs[7].unlink()
    blobs[7].mkdir()
    with pytest.raises(UsageError, match=rf"{SHARDS[7]} is not a regular file"):
        resolve(disk)


def test_downloads_in_progress(disk: Path) -> None:
    cache = hub(disk, SHARDS[:3])
    link = cache / "snapshots" / "0123abc" / SHARDS[1]
    link.resolve().rename(link.resolve().with_suffix(".incomplete"))
    link.unlink()
    with pytest.raises(UsageError, match=rf"{SHARDS[1]} is missing.*a download is in progress"):
        resolve(cache)
    plain = tree(disk / "plain", "config.json", ".cache/huggingface/download/abc.incomplete")
    with pytest.raises(UsageError, match=r"the download of .* is not complete"):
        resolve(plain)
    part = tree(disk / "part", "model.safetensors.part") / "model.safetensors.part"
    with pytest.raises(UsageError, match=r"\.part is not complete"):
        resolve(part)
    # aria2 gives a file its size at once, and notes beside it what is there.
    for names in (["model.safetensors"], ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]):
        root = tree(disk / names[-1], *names, f"{names[-1]}.aria2")
        for way in (root, root / names[0]):
            with pytest.raises(UsageError, match=rf"{names[-1]} is not complete.*\.aria2 beside"):
                resolve(way)
        (root / f"{names[-1]}.aria2").rename(root / "other.bin.aria2")
        assert list(resolve(root).names) == names
    indexed = tree(disk / "indexed", *SHARDS, f"{SHARDS[3]}.aria2", index={SAFE: SHARDS})
    with pytest.raises(UsageError, match=rf"{SHARDS[3]} is not complete"):
        resolve(indexed)


def test_a_numbered_shard_that_is_missing(disk: Path) -> None:
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 4)]
    with pytest.raises(UsageError, match=r"model-00003-of-00004\.safetensors is missing"):
        resolve(tree(disk / "m", *names))


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["__0_0.distcp", ".metadata"], "torch.distributed"),
        (["iter_0000200/__3_1.distcp", "iter_0000200/common.pt"], "torch.distributed"),  # Megatron
        (["weights/__0_0.distcp", "weights/common.pt", "context/io.json"], "torch.distributed"),
        (["rank0.engine"], "TensorRT"),
    ],
)
def test_what_only_its_own_program_reads(disk: Path, names: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=rf"no weight files in .*{why}"):
        resolve(tree(disk / "m", *names))
