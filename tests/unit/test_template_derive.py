# SPDX-License-Identifier: Apache-2.0
"""Orders and slices, as loaders really read."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from pagecache_bpf.errors import PagecacheError, UsageError
from pagecache_bpf.templates import Template, check, derive, require_fit
from pagecache_bpf.templates.template import EXTENT, coalesce
from pagecache_bpf.weights.models import resolve
from tests.unit import weights
from tests.unit.command import environment, run

Places = dict[str, tuple[int, int]]


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, list[Places]]:
    """Two shards whose names, places and natural order all differ."""
    first = {"m.10.b": (8, 4), "m.9.a": (4, 4), "m.2.z": (2, 2), "m.2.a": (16,)}
    second = {"m.1.x": (4, 8), "a": (8,), "m.10.a": (8, 8)}
    return tmp_path, [
        weights.safetensors(tmp_path / f"model-{n}-of-2.safetensors", tensors)
        for n, tensors in enumerate((first, second), 1)
    ]


def ranges(template: Template, consumer: int = 0) -> list[tuple[int, int, int]]:
    return [
        (int(row["file"]), int(row["offset"]), int(row["length"])) for row in template.of(consumer)
    ]


def header(places: list[Places], file: int) -> tuple[int, int, int]:
    return file, 0, min(start for start, _ in places[file].values())


def expected(
    places: list[Places], names: list[tuple[int, str]], together: bool = False
) -> list[tuple[int, int, int]]:
    """Ranges of these tensors, joined where they touch, each file's header before its first.

    Headers stand before all tensors if they are read together.
    """
    rows = [header(places, file) for file in range(len(places))] if together else []
    for file, name in names:
        if all(row[0] != file for row in rows):
            rows.append(header(places, file))
        start, length = places[file][name]
        last = rows[-1]
        if last[0] == file and last[1] + last[2] == start:
            rows[-1] = (file, last[1], last[2] + length)
        else:
            rows.append((file, start, length))
    return rows


def test_keys_are_those_of_safe_open(model: tuple[Path, list[Places]]) -> None:
    root, places = model
    order = []
    for number, path in enumerate(sorted(root.glob("*.safetensors"))):
        with safe_open(path, framework="numpy") as file:
            order += [(number, name) for name in file.keys()]  # noqa: SIM118
    assert ranges(derive(resolve(root))) == expected(places, order)


def test_offset_and_natural(model: tuple[Path, list[Places]]) -> None:
    root, places = model
    whole = [(n, 0, path.stat().st_size) for n, path in enumerate(sorted(root.iterdir()))]
    assert ranges(derive(resolve(root), "offset")) == whole
    names = [(1, "a"), (1, "m.1.x"), (0, "m.2.a"), (0, "m.2.z"), (0, "m.9.a")]
    names += [(1, "m.10.a"), (0, "m.10.b")]
    assert ranges(derive(resolve(root), "natural")) == expected(places, names, together=True)
    sliced = derive(resolve(root), "natural", tp=2, rank=1)
    assert ranges(sliced)[:2] == [header(places, 0), header(places, 1)]
    with pytest.raises(UsageError, match="no order best"):
        derive(resolve(root), "best")


def test_a_list_of_names(model: tuple[Path, list[Places]]) -> None:
    root, places = model
    template = derive(resolve(root), names=["m.2.a", "a", "m.2.a", "m.10.b"])
    names = [(0, "m.2.a"), (1, "a"), (0, "m.10.b")]
    assert ranges(template) == expected(places, names)
    with pytest.raises(UsageError, match="1 tensors that the files do not have"):
        derive(resolve(root), names=["m.2.a", "other"])


def test_every_byte_is_there_once(model: tuple[Path, list[Places]]) -> None:
    root, _ = model
    for order in ("keys", "offset", "natural"):
        template = derive(resolve(root), order)
        assert template.length == template.wanted == template.distinct == template.size


LLAMA = {
    "model.embed_tokens.weight": (128, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (2, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_up_proj.weight": (16, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.layers.0.input_layernorm.weight": (8,),
}
ROWS = ("embed_tokens", "q_proj")


def bytes_of_rank(places: Places, rank: int, tp: int, kv_heads: int = 0) -> set[int]:
    """Every byte that a rank uses, element by element."""
    used: set[int] = set()
    for name, (offset, _) in places.items():
        rows, columns = (*LLAMA[name], 1)[:2]
        for row in range(rows):
            for column in range(columns):
                if name.split(".")[-2] == "k_proj":
                    # Without a number of heads it is not known which rank needs which rows.
                    heads = kv_heads or rows
                    mine = not kv_heads or row // (rows // heads) == rank * heads // tp
                elif name.split(".")[-2] in ROWS:
                    mine = row // (rows // tp) == rank
                elif "gate_up" in name:
                    mine = row % (rows // 2) // (rows // 2 // tp) == rank
                elif "o_proj" in name or "down_proj" in name:
                    mine = column // (columns // tp) == rank
                else:
                    mine = True
                if mine:
                    at = offset + 2 * (row * columns + column)
                    used.update((at, at + 1))
    return used


@pytest.mark.parametrize(("tp", "kv_heads"), [(2, 0), (2, 1), (2, 2), (1, 0)])
def test_slices_of_ranks(tmp_path: Path, tp: int, kv_heads: int) -> None:
    path = tmp_path / "model.safetensors"
    places = weights.safetensors(path, LLAMA)
    if kv_heads:
        (tmp_path / "config.json").write_text(json.dumps({"num_key_value_heads": kv_heads}))
    header = set(range(min(start for start, _ in places.values())))
    template = derive(resolve(tmp_path), tp=tp, gap=0)
    for rank in range(tp):
        covered = {b for _, at, n in ranges(template, rank) for b in range(at, at + n)}
        first = {start for start, _ in places.values()} if tp > 1 else set()
        assert covered == header | first | bytes_of_rank(places, rank, tp, kv_heads)
        alone = derive(resolve(tmp_path), tp=tp, rank=rank, gap=0)
        assert ranges(alone) == ranges(template, rank)
    assert len(template.consumers) == tp and template.tp == tp


def test_gaps_between_slices_are_read_along(tmp_path: Path) -> None:
    weights.safetensors(tmp_path / "m.safetensors", {"x.o_proj.weight": (64, 64)})
    joined, apart = (derive(resolve(tmp_path), tp=2, gap=gap) for gap in (64, 63))
    assert joined.wanted == apart.wanted and len(apart.plain()) > 60
    assert len(apart.extents) <= 4
    assert len(joined.extents) <= 4 and joined.length > apart.length


@pytest.mark.parametrize(
    ("requests", "gap", "share"),
    [
        (None, 0, 1.0),  # nobody has measured it, and 1 MiB is too little to do it now
        (1e9 / 4096, 0, 1.0),  # scattered pages as fast as a stream: nothing is to be gained
        (1e9 / (4096 + 8192), 8192, 2.0),
    ],
)
def test_the_gap_is_what_a_request_costs_the_device(
    tmp_path: Path, requests: float | None, gap: int, share: float
) -> None:
    """A stream of 1 GB/s; rows of 8 KiB, of which a rank of two wants one half."""
    weights.safetensors(tmp_path / "m.safetensors", {"x.o_proj.weight": (128, 4096)})
    size = (tmp_path / "m.safetensors").stat().st_size
    home = tmp_path / "home" / "pagecache-bpf"
    home.mkdir(parents=True)
    if requests is not None:
        speed = {"bytes_per_second": 1e9, "bytes": 1 << 30, "seconds": 1.0, "time_ns": 1}
        device = {str(tmp_path.stat().st_dev): {**speed, "requests_per_second": requests}}
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        (home / "speed.json").write_text(json.dumps({"boot": boot, "devices": device}))
    told = run(
        *("--json", "template", "derive", tmp_path, "--tp", "2", "--rank", "0"),
        env=environment(PAGECACHE_BPF_RUN_DIR=str(home), XDG_CACHE_HOME=str(home.parent)),
    )
    assert told.code == 0, told.err
    assert told.data["gap_bytes"] == gap
    assert told.data["gap_source"] == ("default" if requests is None else "measured")
    (consumer,) = told.data["consumers"]
    header = size - (1 << 20)
    assert consumer["wanted_bytes"] == header + (1 << 19)
    # The last row ends with what is wanted of it.
    assert consumer["bytes"] == header + share * (1 << 19) - (4096 if gap else 0)


def test_ranks_that_there_are_not(model: tuple[Path, list[Places]]) -> None:
    with pytest.raises(UsageError, match="no rank 2"):
        derive(resolve(model[0]), tp=2, rank=2)


def test_gguf_and_torch_have_the_order_of_their_header(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    base = weights.gguf(path, [("b", (64,), 0, 512), ("a", (64,), 0, 0)])
    (header, b, a) = ranges(derive(resolve(path)))
    assert header[1] == 0 and header[2] <= base
    assert (b, a) == ((0, base + 512, 256), (0, base, 256))


def test_snapshots_keep_the_names_of_their_links(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    for name in ("blobs", "snapshots/abc", "refs"):
        (cache / name).mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    weights.safetensors(cache / "blobs" / "0f3e", {"a": (4,)})
    link = cache / "snapshots" / "abc" / "model.safetensors"
    link.symlink_to("../../blobs/0f3e")
    template = derive(resolve(cache / "snapshots" / "abc"))
    assert [file.path for file in template.files] == ["model.safetensors"]
    assert check(template, cache / "snapshots" / "abc").whole


def test_fit(model: tuple[Path, list[Places]]) -> None:
    root, _ = model
    template = derive(resolve(root))
    assert check(template, root).whole
    second = root / "model-2-of-2.safetensors"
    weights.safetensors(second, {"m.1.y": (4, 8), "a": (8,), "m.10.a": (8, 8)})
    fit = check(template, root)
    assert [(mismatch.path, mismatch.why) for mismatch in fit.mismatches] == [
        ("model-2-of-2.safetensors", "its header is another one")
    ]
    assert fit.fitting_bytes == (root / "model-1-of-2.safetensors").stat().st_size
    with pytest.raises(PagecacheError, match=r"t does not fit the files: model-2.* fit\)"):
        require_fit(template, fit, "t")
    partial = require_fit(template, fit, "t", partial=True)
    assert set(partial.extents["file"].tolist()) == {0}
    second.write_bytes(b"x")
    assert "it has 1 bytes, not" in check(template, root).mismatches[0].why
    second.unlink()
    assert "No such file" in check(template, root).mismatches[0].why


def test_coalesce() -> None:
    rows = [
        (0, 0, 0, 10, 10),
        (0, 0, 10, 5, 5),
        (0, 0, 20, 5, 5),
        (0, 1, 25, 5, 5),
        (1, 1, 30, 5, 5),
    ]
    table = np.array(rows, EXTENT)
    assert coalesce(table).tolist() == [(0, 0, 0, 15, 15), *rows[2:]]
    assert coalesce(table, 5).tolist() == [(0, 0, 0, 25, 20), *rows[3:]]


def test_a_large_model_takes_little_memory(tmp_path: Path) -> None:
    """1,000 shards, 100,000 tensors; the time it takes is benchmarks/template.py's."""
    large_model(tmp_path)
    code = (
        "import re, sys\n"
        "from pagecache_bpf.weights.models import resolve\n"
        "from pagecache_bpf.templates import derive\n"
        "template = derive(resolve(sys.argv[1]))\n"
        # ru_maxrss would be the parent's, where that is larger: it outlives exec().
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(len(template.files), len(template.extents) >= 100_000, peak)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True, timeout=120
    )
    files, enough, kib = done.stdout.split()
    assert (files, enough) == ("1000", "True")
    assert int(kib) < 200 << 10


def large_model(root: Path, shards: int = 1000, tensors: int = 100) -> None:
    """Sparse shards with an index: headers only."""
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {}, 0
        for number in range(tensors):
            # Stored in another order than by name, so that nothing can be joined.
            key = f"model.layers.{shard}.mlp.experts.{tensors - number:03d}.down_proj.weight"
            header[key] = {
                "dtype": "BF16",
                "shape": [512, 64],
                "data_offsets": [at, at + 65536],
            }
            weight_map[key] = name
            at += 65536
        text = json.dumps(header).encode()
        path = root / name
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + at)
    index = root / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
