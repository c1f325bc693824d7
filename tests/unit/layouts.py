# SPDX-License-Identifier: Apache-2.0
"""What the tests of layouts share: trees of files, and a cache as the Hub's."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tests.unit import weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4976698672\n"
SHARDS = [f"model-{number:05}-of-00012.safetensors" for number in range(1, 13)]


def tree(root: Path, *names: str, index: dict[str, list[str]] | None = None) -> Path:
    """Files of 64 bytes of these names, and indexes of these shards."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(name.encode()).digest() * 2)
    for name, shards in (index or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        weight_map = {f"layer.{number}": shard for number, shard in enumerate(shards)}
        (root / name).write_text(json.dumps({"weight_map": weight_map}))
    return root


SAFE = "model.safetensors.index.json"
BIN = "pytorch_model.bin.index.json"


def hub(root: Path, names: list[str], blobs: Path | None = None) -> Path:
    """A cache directory of Hugging Face, whose blobs are named by hashes."""
    cache = root / "models--acme--tiny"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = blobs or cache / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for name in names:
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        weights.safetensors(blob, {f"layers.{name}.k_proj.weight": (4, 8)})
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    tree(snapshot, index={SAFE: names})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    return cache
