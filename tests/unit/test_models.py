# SPDX-License-Identifier: Apache-2.0
"""From a path to weight files: every layout that people have, every way it can be wrong."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagecache_bpf.errors import PrivilegeError, UsageError
from pagecache_bpf.kernel.kernelfs import LIVE
from pagecache_bpf.weights import directory, models, weight_format
from pagecache_bpf.weights.files import IN_MEMORY
from pagecache_bpf.weights.models import resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory whose files have pages of their own, as models have."""
    if LIVE.fstype(tmp_path.stat().st_dev) in IN_MEMORY:
        pytest.skip("the temporary directory is in memory (give --basetemp on a disk)")
    return tmp_path


def weights(path: Path, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"w" * size)
    return path


def index(directory: Path, *shards: str, name: str = "model.safetensors.index.json") -> Path:
    path = directory / name
    path.write_text(json.dumps({"weight_map": {f"layer.{i}": s for i, s in enumerate(shards)}}))
    return path


def hub(directory: Path, *revisions: str, main: str | None = None) -> Path:
    """A Hugging Face cache directory: snapshots hold links into blobs."""
    cache = directory / "models--org--tiny"
    for revision in revisions:
        snapshot = cache / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for name in ("model-1.safetensors", "model-2.safetensors"):
            blob = weights(cache / "blobs" / f"{revision}-{name}")
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        index(snapshot, "model-1.safetensors", "model-2.safetensors")
    if main is not None:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(main)
    return cache


def test_a_single_file_is_a_model_whatever_its_suffix(disk: Path) -> None:
    file = weights(disk / "weights.q4")
    model = resolve(file)
    assert (model.name, model.root, model.files) == ("weights.q4", file, (file,))
    assert model.size == 64


def test_a_directory_of_shards(disk: Path) -> None:
    shards = tuple(weights(disk / "llama" / f"model-{i}.safetensors") for i in (1, 2, 3))
    (disk / "llama" / "config.json").write_text("{}")
    model = resolve(disk / "llama")
    assert model.name == "llama"
    assert model.files == shards


@pytest.mark.parametrize("suffix", sorted(weight_format.suffixes()))
def test_every_suffix_counts_also_in_capitals(disk: Path, suffix: str) -> None:
    file = weights(disk / "m" / f"weights.{suffix.upper()}")
    assert resolve(disk / "m").files == (file,)


def test_an_index_chooses_the_files(disk: Path) -> None:
    first = weights(disk / "m" / "model-1.safetensors")
    weights(disk / "m" / "consolidated.safetensors")
    weights(disk / "m" / "pytorch_model.bin")
    index(disk / "m", "model-1.safetensors", "model-1.safetensors")
    index(disk / "m", "pytorch_model.bin", name="pytorch_model.bin.index.json")
    assert resolve(disk / "m").files == (first,)


def test_an_index_of_pickled_files_is_taken_too(disk: Path) -> None:
    shard = weights(disk / "m" / "pytorch_model-1.bin")
    weights(disk / "m" / "training_args.bin")
    index(disk / "m", "pytorch_model-1.bin", name="pytorch_model.bin.index.json")
    assert resolve(disk / "m").files == (shard,)


def test_weights_below_the_directory_and_hidden_ones(disk: Path) -> None:
    unet = weights(disk / "pipe" / "unet" / "diffusion.safetensors")
    vae = weights(disk / "pipe" / "vae" / "diffusion.safetensors")
    weights(disk / "pipe" / ".cache" / "partial.safetensors")
    weights(disk / "pipe" / "a" / "b" / "c" / "d" / "e" / "deep.safetensors")
    assert resolve(disk / "pipe").files == (unet, vae)


def test_a_file_reached_twice_counts_once(disk: Path) -> None:
    real = weights(disk / "m" / "a.safetensors")
    os.link(real, disk / "m" / "b.safetensors")
    (disk / "m" / "c.safetensors").symlink_to(real)
    (disk / "m" / "again").symlink_to(".")
    assert len(resolve(disk / "m").files) == 1


def test_an_empty_file_beside_the_shards_is_passed_over(disk: Path) -> None:
    real = weights(disk / "m" / "a.safetensors")
    (disk / "m" / "b.bin").touch()
    assert resolve(disk / "m").files == (real,)


def test_a_hub_snapshot_leads_to_its_blobs(disk: Path) -> None:
    cache = hub(disk, "abc123", main="abc123")
    model = resolve(cache / "snapshots" / "abc123")
    assert model.name == "org/tiny"
    assert [file.parent for file in model.files] == [cache / "blobs"] * 2
    assert not any(file.is_symlink() for file in model.files)


@pytest.mark.parametrize(("main", "chosen"), [("new", "new"), ("old\n", "old")])
def test_a_hub_cache_follows_its_main_reference(disk: Path, main: str, chosen: str) -> None:
    model = resolve(hub(disk, "old", "new", main=main))
    assert model.name == "org/tiny"
    assert all(file.name.startswith(chosen) for file in model.files)


def test_a_hub_cache_with_one_snapshot_needs_no_reference(disk: Path) -> None:
    assert len(resolve(hub(disk, "only")).files) == 2


@pytest.mark.parametrize("main", [None, "absent"])
def test_a_hub_cache_that_does_not_say_which(disk: Path, main: str | None) -> None:
    with pytest.raises(UsageError, match="does not say which snapshot") as caught:
        resolve(hub(disk, "one", "two", main=main))
    assert "one, two" in caught.value.why


def test_missing(disk: Path) -> None:
    with pytest.raises(UsageError, match=r"absent does not exist"):
        resolve(disk / "absent")


def test_a_broken_link_is_named_with_its_target(disk: Path) -> None:
    (disk / "m").mkdir()
    (disk / "m" / "a.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(UsageError, match=r"m/a\.safetensors is a broken symbolic link.*blobs/gone"):
        resolve(disk / "m")
    with pytest.raises(UsageError, match="is a broken symbolic link"):
        resolve(disk / "m" / "a.safetensors")


def test_links_in_a_circle(disk: Path) -> None:
    (disk / "a").symlink_to(disk / "b")
    (disk / "b").symlink_to(disk / "a")
    with pytest.raises(UsageError, match=r"cannot be followed.*back to themselves"):
        resolve(disk / "a")


def test_an_empty_file(disk: Path) -> None:
    (disk / "a.gguf").touch()
    with pytest.raises(UsageError, match=r"a\.gguf is empty"):
        resolve(disk / "a.gguf")


def test_an_empty_directory(disk: Path) -> None:
    (disk / "m").mkdir()
    with pytest.raises(UsageError, match=r"no weight files in .*: the directory is empty"):
        resolve(disk / "m")


def test_a_directory_without_weights(disk: Path) -> None:
    weights(disk / "m" / "README.md")
    with pytest.raises(UsageError, match=r"no weight files in .*safetensors"):
        resolve(disk / "m")


def test_a_directory_of_empty_weights(disk: Path) -> None:
    (disk / "m").mkdir()
    (disk / "m" / "a.safetensors").touch()
    with pytest.raises(UsageError, match=r"no weight files in .*empty \(a\.safetensors\)"):
        resolve(disk / "m")


def test_what_is_no_file(disk: Path) -> None:
    os.mkfifo(disk / "pipe.bin")
    with pytest.raises(UsageError, match="not a regular file: it is a named pipe"):
        resolve(disk / "pipe.bin")
    with pytest.raises(UsageError, match="not a regular file: it is a named pipe"):
        resolve(disk)  # reached through its directory
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(disk / "socket"))
        with pytest.raises(UsageError, match="it is a socket"):
            resolve(disk / "socket")
    with pytest.raises(UsageError, match="it is a character device"):
        resolve("/dev/null")


@pytest.mark.parametrize("path", ["/proc/version", "/sys/kernel/notes", "/proc/self/maps"])
def test_virtual_files_have_no_pages(path: str) -> None:
    with pytest.raises(UsageError, match=r"no pages to read ahead: the file system \((proc|sysfs)"):
        resolve(path)


def test_files_in_memory_have_nothing_to_read_ahead() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or LIVE.fstype(shm.stat().st_dev) != "tmpfs":
        pytest.skip("there is no tmpfs at /dev/shm")
    file = shm / f"pagecache-bpf-test-{os.getpid()}.gguf"
    try:
        weights(file)
        with pytest.raises(UsageError, match="on tmpfs the file is in memory already"):
            resolve(file)
    finally:
        file.unlink(missing_ok=True)


def test_an_index_that_names_a_missing_shard(disk: Path) -> None:
    weights(disk / "m" / "model-1.safetensors")
    index(disk / "m", "model-1.safetensors", "model-2.safetensors")
    with pytest.raises(UsageError, match=r"model-2\.safetensors is missing.*index\.json names it"):
        resolve(disk / "m")


def test_an_index_that_names_an_empty_shard(disk: Path) -> None:
    (disk / "m").mkdir()
    (disk / "m" / "model-1.safetensors").touch()
    index(disk / "m", "model-1.safetensors")
    with pytest.raises(UsageError, match=r"model-1\.safetensors is empty"):
        resolve(disk / "m")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff\xfe", "[" * 10**5],
)
def test_an_index_that_is_none(disk: Path, text: str) -> None:
    weights(disk / "m" / "model-1.safetensors")
    (disk / "m" / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="is not a weight index"):
        resolve(disk / "m")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "a\0b"])
def test_an_index_cannot_lead_out_of_its_directory(disk: Path, name: str) -> None:
    weights(disk / "secret.safetensors")
    (disk / "m").mkdir()
    index(disk / "m", name)
    with pytest.raises(UsageError, match="outside its directory"):
        resolve(disk / "m")


def test_a_tree_that_is_no_model(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_ENTRIES", 3)
    for i in range(5):
        weights(disk / "m" / f"{i}.bin")
    with pytest.raises(UsageError, match="holds more than 3 files"):
        resolve(disk / "m")


def test_a_file_that_may_not_be_read(disk: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything; test_cli_errors has this as another user")
    weights(disk / "a.gguf").chmod(0)
    with pytest.raises(PrivilegeError, match="cannot be opened: permission denied"):
        resolve(disk / "a.gguf")


def test_a_given_name_is_kept(disk: Path) -> None:
    assert resolve(weights(disk / "a.gguf"), "org/model@v1").name == "org/model@v1"


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 64, "ünicode", "a\n", "/x"])
def test_a_bad_name_is_refused(disk: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not a model name"):
        resolve(weights(disk / "a.gguf"), name)


@given(st.text(alphabet=st.characters(exclude_characters="/\0"), min_size=1).map(lambda s: f"/{s}"))
def test_a_default_name_is_always_legal(path: str) -> None:
    name = models._default_name(Path(path))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+@/-]{0,62}", name)


def test_long_names_stay_apart() -> None:
    first, second = (models._default_name(Path("/m") / ("x" * 100 + end)) for end in "ab")
    assert first != second
    assert len(first) == len(second) == 63
