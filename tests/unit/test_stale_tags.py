# SPDX-License-Identifier: Apache-2.0
"""Files that were replaced, deleted or added since a model was tagged are told and tagged anew."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pagecache_bpf.cli import stale_tags
from pagecache_bpf.cli.tagging import Tagging
from pagecache_bpf.cli.verbs import status
from pagecache_bpf.kernel import kernelfs
from pagecache_bpf.kernel.control_device import Tag, size_on_disk
from pagecache_bpf.kernel.file_key import identity_at
from pagecache_bpf.kernel.kernelfs import KernelFS, Mount
from pagecache_bpf.policy import read_errors
from pagecache_bpf.weights.models import resolve


def tag_of(path: Path, model: str = "m") -> Tag:
    return Tag(*identity_at(path), "noop", model, 1, str(path), True, 0)


def model(directory: Path, count: int) -> list[Tag]:
    paths = [directory / f"part{number}.safetensors" for number in range(count)]
    for path in paths:
        path.write_bytes(b"x" * 100)
    return [tag_of(path) for path in paths]


def look(tags: list[Tag]) -> dict[str, list[str]]:
    return vars(stale_tags.of_model(tags, stale_tags.identities(tags)))


def replace_by_rename(path: Path) -> None:
    fresh = path.with_name("fresh")
    fresh.write_bytes(b"y" * 100)
    fresh.rename(path)


def test_what_is_as_it_was_tagged_is_not_stale(tmp_path: Path) -> None:
    assert look(model(tmp_path, 3)) == {"replaced": [], "gone": [], "untagged": []}


def test_replaced_gone_and_new_files_are_told(tmp_path: Path) -> None:
    tags = model(tmp_path, 3)
    replace_by_rename(Path(tags[0].path))
    os.unlink(tags[1].path)
    fresh = tmp_path / "part3.safetensors"
    fresh.write_bytes(b"x")
    assert look(tags) == {
        "replaced": [tags[0].path],
        "gone": [tags[1].path],
        "untagged": [str(fresh)],
    }


def test_a_file_that_got_the_inode_number_of_another_is_another(tmp_path: Path) -> None:
    """By its generation, where the file system tells it."""
    (tag,) = model(tmp_path, 1)
    if not tag.generation:
        return
    before = Tag(*tag.identity[:3], tag.generation + 1, "noop", "m", 1, tag.path, True, 0)
    assert look([before])["replaced"] == [tag.path]


def test_who_tagged_one_of_several_models_is_told_nothing(tmp_path: Path) -> None:
    tags = model(tmp_path, 1)
    for quantization in ("Q4_K_M", "Q8_0"):
        (tmp_path / f"m-{quantization}.gguf").write_bytes(b"x")
    chosen = tag_of(tmp_path / "m-Q8_0.gguf")
    assert look([chosen])["untagged"] == []
    assert look(tags)["untagged"] == []


def test_status_says_what_is_stale_and_what_to_do(tmp_path: Path) -> None:
    tags = model(tmp_path, 2)
    replace_by_rename(Path(tags[0].path))
    os.unlink(tags[1].path)
    policy = status._ended("agent", "noop", tags, stale_tags.identities(tags), [], {})
    (told,) = policy["models"]
    assert (told["replaced"], told["gone"]) == ([tags[0].path], [tags[1].path])
    console = Console(width=200, record=True, file=io.StringIO())
    status._print_policy(console, policy, False)
    text = console.export_text()
    assert "m: replaced, and no longer governed: 1 file (part0.safetensors)" in text
    assert f"m: tag again: pagecache-bpf tag --policy noop --model m {tmp_path}" in text
    assert "m: gone: 1 file (part1.safetensors)" in text


def test_tagging_again_takes_the_tag_off_the_file_that_was_replaced(tmp_path: Path) -> None:
    tags = model(tmp_path, 2)
    replace_by_rename(Path(tags[0].path))
    untagged: list[tuple[Any, ...]] = []

    def untag_all(identities: list[tuple[Any, ...]]) -> list[bool]:
        untagged.extend(identities)
        return [True] * len(identities)

    engines: Any = SimpleNamespace(
        tags=lambda: tags, tag_files=lambda files, **_: None, untag_all=untag_all
    )
    tagging = Tagging(engines, "noop")
    tagging.add(resolve(tmp_path, "m"))
    assert untagged == [tags[0].identity]


def test_reads_that_failed_are_told_in_words() -> None:
    assert read_errors.meaning(errno.EIO) == os.strerror(errno.EIO)
    assert "had ended" in read_errors.meaning(errno.ECHILD)
    assert "another file" in read_errors.meaning(errno.ESTALE)


def test_what_a_server_is_asked_for_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not answer, and then `status` would not either."""
    tags = model(tmp_path, 2)
    Path(tags[0].path).unlink()
    assert look(tags)["gone"] == [tags[0].path]

    def mounted(kind: str) -> None:
        mounts = [
            Mount(os.makedev(8, 1), "/", "ext4"),
            Mount(os.makedev(0, 40), str(tmp_path), kind),
        ]
        monkeypatch.setattr(KernelFS, "mounts", lambda self: mounts)
        kernelfs._mounts_at.cache_clear()

    mounted("nfs4")
    assert look(tags) == {"replaced": [], "gone": [], "untagged": []}
    assert size_on_disk(tags[1]) is None
    mounted("btrfs")
    assert look(tags)["gone"] == [tags[0].path]
    kernelfs._mounts_at.cache_clear()
