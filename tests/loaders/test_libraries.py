# SPDX-License-Identifier: Apache-2.0
"""Libraries read the bytes of the derived template, in its order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import drop
from pagecache_bpf import templates
from pagecache_bpf.weights import headers
from pagecache_bpf.weights.models import Model, resolve
from tests.loaders import checkpoints
from tests.loaders.page_trace import PageTrace
from tests.loaders.reads import PAGE, Place, expected, header, packed, tensors_of

_SCRIPT = Path(__file__).with_name("library_load.py")


def _load(how: str, path: Path, model: Model, trace: PageTrace) -> list[Place]:
    """Have a library load a model, and return the pages that it read, each once."""
    files = {file.stat().st_ino: file.name for file in model.files}
    os.sync()
    drop(model.files)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with trace.record() as touches:
        done = subprocess.run(
            [sys.executable, str(_SCRIPT), how, str(path)],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(dict.fromkeys((files[inode], page) for inode, page in touches if inode in files))


def _pages(model: Model, order: str) -> list[Place]:
    """Return the pages of the template in an order, each once."""
    template = templates.derive(model, order)
    pages: dict[Place, None] = {}
    for extent in template.plain():
        name = Path(template.files[int(extent["file"])].path).name
        begin, length = int(extent["offset"]), int(extent["length"])
        for page in range(begin // PAGE, (begin + length - 1) // PAGE + 1):
            pages[name, page] = None
    return list(pages)


def _tensors(model: Model, pages: list[Place]) -> list[str]:
    """Return the tensors in the order in which pages of their own come."""
    owners: dict[Place, str | None] = {}
    for path in model.files:
        found = headers.parse(path)
        ends = (found.offsets + found.lengths).tolist()
        for name, begin, end in zip(found.names, found.offsets.tolist(), ends, strict=True):
            for page in range(begin // PAGE, -(-end // PAGE)):
                place = (path.name, page)
                owners[place] = None if place in owners else name
    own = (owners.get(page) for page in pages)
    return list(dict.fromkeys(name for name in own if name))


@pytest.mark.parametrize(
    ("how", "order"), [("safetensors", "keys"), ("safetensors_offsets", "offset")]
)
def test_a_library_reads_as_its_order_says(
    how: str, order: str, disk: Path, trace: PageTrace, tmp_path: Path
) -> None:
    with checkpoints.moved(checkpoints.deep(tmp_path), disk) as path:
        model = resolve(path)
        read = _load(how, path, model, trace)
        expected = {name: _pages(model, name) for name in ("keys", "offset", "natural")}
        assert set(read) == set(expected[order])
        by_order = {name: _tensors(model, pages) for name, pages in expected.items()}
        assert len({tuple(names) for names in by_order.values()}) == 3
        assert _tensors(model, read) == by_order[order]


@pytest.mark.parametrize("how", ["torch_load", "torch_load_mapped"])
def test_torch_reads_storages_in_the_order_of_their_numbers(
    how: str, disk: Path, trace: PageTrace
) -> None:
    import torch

    names = [f"layers.{layer}.{part}" for layer in (10, 2, 11, 1) for part in "ba"]
    path = disk / f"{how}.bin"
    torch.save({name: torch.full((64, 512), float(at)) for at, name in enumerate(names)}, path)
    model = resolve(path)
    read = _load(how, path, model, trace)
    template = _pages(model, "keys")
    assert set(read) == set(template)
    # The edges of storages share pages with the pickle and the archive's directory.
    found = headers.parse(path)
    inner = ((found.offsets + found.lengths // 2) // PAGE).tolist()
    owners = {(path.name, page): name for page, name in zip(inner, found.names, strict=True)}
    orders = [[owners[page] for page in pages if page in owners] for pages in (read, template)]
    assert orders[0] == orders[1] == [f"data/{at}" for at in range(len(names))]


_NATURAL = {"tp": 1, "ep": 1, "pp": 1, "order": "natural"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe", "gpt_oss", "bert", "t5"])
def test_transformers_reads_the_template(
    name: str, disk: Path, trace: PageTrace, tmp_path: Path, reads: dict[str, Any]
) -> None:
    """In its order: of all files together, and experts, too, which it joins later."""
    with checkpoints.moved(checkpoints.make(name, tmp_path, shards="16MB"), disk) as path:
        files = {file.name: header(file) for file in sorted(path.glob("*.safetensors"))}
        assert len(files) > 1
        read = _load("transformers", path, resolve(path), trace)
        template = expected(path, _NATURAL, 0)
        assert set(read) == set(template)
        order = tensors_of(read, files)
        assert order == tensors_of(template, files)
        assert order != tensors_of(expected(path, {**_NATURAL, "order": "keys"}, 0), files)
        pages = {file: packed(page for at, page in read if at == file) for file in files}
        config = {"config.json": json.loads((path / "config.json").read_text())}
    case = {"config": config, "files": files, "ranks": [{"pages": pages, "tensors": order}]}
    reads[f"transformers-{name}"] = {**_NATURAL, **case}


@pytest.mark.parametrize("how", ["llama_cpp", "llama_cpp_mapped"])
def test_llama_cpp_reads_the_template(how: str, disk: Path, trace: PageTrace) -> None:
    """Mapped, as is usual, in its order; otherwise in that in which llama.cpp makes tensors."""
    pytest.importorskip("xllamacpp")
    path = checkpoints.gguf(disk / f"{how}.gguf")
    model = resolve(path)
    read, template = _load(how, path, model, trace), _pages(model, "keys")
    assert set(read) == set(template)
    # Its memory for a mapping ends in the file's last page, which it looks at before all others.
    assert read[0] == template[-1]
    made = ["token_embd", "output"]
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up")
    made += [f"blk.{layer}.{part}" for layer in range(3) for part in parts]
    if how == "llama_cpp_mapped":
        assert read[1:] == template[:-1]
    else:
        assert _tensors(model, read) == [f"{name}.weight" for name in made]
