# SPDX-License-Identifier: Apache-2.0
"""How a rank's part of one tensor is cut: quantizations, heads, and what is whole and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagecache_bpf import templates
from pagecache_bpf.templates.parallel import Parallel
from pagecache_bpf.weights.models import resolve
from tests.unit.command import run
from tests.unit.rank_parts import reads, sharding, write


def test_block_scales_follow_the_rows_that_they_stand_for() -> None:
    shapes = {
        "m.layers.0.mlp.up_proj.weight": (1536, 512),
        "m.layers.0.mlp.up_proj.weight_scale_inv": (12, 4),
        "m.layers.0.mlp.down_proj.weight": (512, 1536),
        "m.layers.0.mlp.down_proj.weight_scale_inv": (4, 12),
    }
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = sharding({"quantization_config": quantization}, shapes, Parallel(8))
    for rank in range(8):  # 192 rows are one and a half blocks
        rows = range(rank * 192 // 128, -(-(rank + 1) * 192 // 128))
        got = reads(found, "m.layers.0.mlp.up_proj.weight_scale_inv", rank)
        assert got.any(1).nonzero()[0].tolist() == list(rows)
        got = reads(found, "m.layers.0.mlp.down_proj.weight_scale_inv", rank)
        assert got.any(0).nonzero()[0].tolist() == list(rows)


@pytest.mark.parametrize("size", [128, 64, 32])
def test_blocks_whose_size_is_not_told_are_found_by_their_number(size: int) -> None:
    """The last one is not full."""
    rows = 5 * size - size // 2
    shapes = {
        "m.layers.0.mlp.up_proj.weight": (rows, 512),
        "m.layers.0.mlp.up_proj.weight_scale_inv": (5, 4),
    }
    found = sharding({"quantization_config": {"quant_method": "fp8"}}, shapes, Parallel(2))
    for rank in range(2):
        begin, end = rank * rows // 2, (rank + 1) * rows // 2
        got = reads(found, "m.layers.0.mlp.up_proj.weight_scale_inv", rank)
        expected = list(range(begin // size, -(-end // size)))
        assert got.any(1).nonzero()[0].tolist() == expected


def test_act_order_needs_the_scales_of_all_groups() -> None:
    shapes = {
        "m.layers.0.mlp.down_proj.qweight": (64, 16),
        "m.layers.0.mlp.down_proj.scales": (8, 16),
        "m.layers.0.mlp.down_proj.g_idx": (512,),
    }
    for ordered in (False, True):
        quantization = {"quant_method": "gptq", "desc_act": ordered}
        found = sharding({"quantization_config": quantization}, shapes, Parallel(2))
        assert reads(found, "m.layers.0.mlp.down_proj.qweight", 1)[32:].all()
        assert reads(found, "m.layers.0.mlp.down_proj.scales", 1).all() == ordered
        assert reads(found, "m.layers.0.mlp.down_proj.g_idx", 1)[256:].all()


# Layers whose output has several parts: gate, input, two states, steps; two keys, values.
_MAMBA2 = {
    "m.layers.0.mamba.in_proj.weight": (2 * 16 + 2 * 6 + 4, 8),
    "m.layers.0.mamba.conv1d.weight": (16 + 2 * 6, 1, 4),
    "m.layers.0.mamba.A_log": (4,),
    "m.layers.0.mamba.out_proj.weight": (8, 16),
}
_MAMBA = {
    "m.layers.0.mamba.in_proj.weight": (2 * 16, 8),
    "m.layers.0.mamba.conv1d.weight": (16, 1, 4),
    "m.layers.0.mamba.A_log": (16, 4),
    "m.layers.0.mamba.out_proj.weight": (8, 16),
}
_LINEAR = {
    "m.layers.0.linear_attn.in_proj_qkv.weight": (2 * 8 + 16, 8),
    "m.layers.0.linear_attn.out_proj.weight": (8, 16),
}


@pytest.mark.parametrize(
    ("config", "shapes", "name", "ranges"),
    [
        (
            {"n_groups": 2},
            _MAMBA2,
            "mamba.in_proj",
            [(8, 16), (24, 32), (35, 38), (41, 44), (46, 48)],
        ),
        # One group is every rank's, and so are groups that do not divide or are not told.
        ({"n_groups": 1}, _MAMBA2, "mamba.in_proj", [(8, 16), (24, 44), (46, 48)]),
        ({"mamba_n_groups": 3}, _MAMBA2, "mamba.in_proj", [(8, 16), (24, 44), (46, 48)]),
        ({}, _MAMBA2, "mamba.in_proj", [(8, 16), (24, 44), (46, 48)]),
        ({"mamba_ngroups": 2}, _MAMBA2, "mamba.conv1d", [(8, 16), (19, 22), (25, 28)]),
        ({}, _MAMBA, "mamba.in_proj", [(8, 16), (24, 32)]),
        ({}, _MAMBA, "mamba.conv1d", [(8, 16)]),
        ({}, _LINEAR, "linear_attn.in_proj_qkv", [(4, 8), (12, 16), (24, 32)]),
        (
            {"model_type": "lfm2"},
            {"m.layers.0.conv.in_proj.weight": (24, 8)},
            "conv.in_proj",
            [(4, 8), (12, 16), (20, 24)],
        ),
    ],
)
def test_parts_one_after_the_other(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    name: str,
    ranges: list[tuple[int, int]],
) -> None:
    """Of each of the parts rank 1 of 2 has the second half."""
    name = f"m.layers.0.{name}.weight"
    found = sharding(config, shapes, Parallel(2))
    rows = reads(found, name, 1).reshape(shapes[name][0], -1).any(1)
    assert np.flatnonzero(rows).tolist() == [at for part in ranges for at in range(*part)]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mamba.in_proj", {"m.layers.0.mamba.out_proj.weight": (8, 16)}),
        ("mamba.in_proj", {"m.layers.0.mamba.A_log": (4,)}),
        ("mamba.in_proj", {**_MAMBA, "m.layers.0.mamba.in_proj.weight": (24, 8)}),
        ("mamba.in_proj", {**_MAMBA2, "m.layers.0.mamba.in_proj.weight": (36, 8)}),
        ("mamba.conv1d", {**_MAMBA, "m.layers.0.mamba.conv1d.weight": (20, 1, 4)}),
        ("linear_attn.in_proj_qkv", {"m.layers.0.linear_attn.out_proj.weight": (8, 24)}),
        ("linear_attn.in_proj_qkvz", {}),
        ("conv.in_proj", {"m.layers.0.conv.in_proj.weight": (25, 8)}),
    ],
)
def test_parts_that_do_not_add_up_are_whole(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    name = f"m.layers.0.{name}.weight"
    found = sharding({}, {name: (24, 8), **shapes}, Parallel(2))
    assert all(reads(found, name, rank).all() for rank in (0, 1))


def test_rows_that_are_put_into_another_order_are_whole() -> None:
    names = ("language_model.model.layers.0.self_attn", "vision_model.model.layers.0.self_attn")
    shapes = {f"{name}.{part}_proj.weight": (8, 8) for name in names for part in "qkv"}
    config = {
        "model_type": "llama4",
        "text_config": {"num_attention_heads": 8, "model_type": "llama4_text"},
        "vision_config": {"num_attention_heads": 8},
    }
    found = sharding(config, shapes, Parallel(2))
    cut = [name for name in shapes if not reads(found, name, 0).all()]
    assert cut == ["language_model.model.layers.0.self_attn.v_proj.weight"]
    # Also by stages of a pipeline that have other layers.
    layers = {
        f"model.layers.{n}.self_attn.{part}_proj.weight": (8, 8) for n in "01" for part in "qv"
    }
    staged = sharding({**config, "num_hidden_layers": 2}, layers, Parallel(pp=2))
    assert [[bool(reads(staged, name, rank).all()) for rank in (0, 1)] for name in layers] == [
        *([True, True], [True, False], [True, True], [False, True])
    ]
    own = sharding({"n_layers": 2}, {"layers.1.attention.wq.weight": (8, 8)}, Parallel(pp=2))
    assert reads(own, "layers.1.attention.wq.weight", 0).all()


def test_what_other_methods_have_quantized_is_whole_and_told() -> None:
    names = [f"l.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("up", "down")]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (32, 1))
    shapes["l.0.input_layernorm.weight"] = (8,)
    found = sharding({"quantization_config": {"quant_method": "bitsandbytes"}}, shapes, Parallel(2))
    assert all(reads(found, name, rank).all() for name in shapes for rank in (0, 1))
    assert list(found.unknown) == ["l.#.mlp.up_proj.weight", "l.#.mlp.down_proj.weight"]


def test_experts_under_the_name_of_a_single_one_are_whole_and_told() -> None:
    name = "model.layers.4.moe.gate_proj.weight"
    found = sharding({}, {name: (8, 16, 4)}, Parallel(2))
    assert reads(found, name, 1).all() and list(found.unknown.values()) == [name]
    turned = sharding({"model_type": "mimo_v2"}, {"l.0.qkv_proj.weight": (64, 8)}, Parallel(2))
    assert reads(turned, "l.0.qkv_proj.weight", 0).all() and not turned.unknown


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("gpt_neox", [(12, 24)]),  # by groups: two of queries, one of keys, one of values
        ("bailing_moe", [(6, 12), (15, 18), (21, 24)]),  # one after the other
        ("something_new", [(6, 24)]),  # either
        ("internlm2", [(0, 24)]),
    ],
)
def test_fused_queries_of_an_order_that_is_not_known(
    kind: str, rows: list[tuple[int, int]]
) -> None:
    module = "attention.wqkv" if kind == "internlm2" else "attention.query_key_value"
    name = f"model.layers.0.{module}.weight"
    config = {"model_type": kind, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = sharding(config, {name: (24, 8)}, Parallel(2))
    read = np.flatnonzero(reads(found, name, 1).any(1)).tolist()
    assert read == [at for part in rows for at in range(*part)]


def test_heads_of_a_linear_attention_are_together() -> None:
    name = "m.layers.0.linear_attn.in_proj_qkvz.weight"
    for heads, wholly in ((4, False), (6, True), (1, True)):
        found = sharding({"linear_num_key_heads": heads}, {name: (48, 8)}, Parallel(4))
        assert reads(found, name, 1).all() == wholly
        assert reads(found, name, 1)[12:24].all()


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_key_value_heads": 2}, 2),
        ({"num_key_value_heads": [8, 2]}, 2),
        ({"num_attention_heads": 8}, 8),
        ({"text_config": {"num_key_value_heads": 2}, "num_key_value_heads": 8}, 2),
        ({"model": {}, "thinker_config": {"text_config": {"num_key_value_heads": 2}}}, 2),
        ({"attn_config": {"kv_n_heads": 2}, "n_heads": 8}, 2),
        ({"n_kv_heads": 2, "n_heads": 8}, 2),
        ({"multi_query_group_num": 2, "num_attention_heads": 8}, 2),
        ({"num_key_value_heads": [8]}, 0),  # of layer 1 it is not told
        ({"block_configs": [{}], "num_attention_heads": 8}, 0),
        ({}, 0),
    ],
)
def test_heads_wherever_they_stand(config: dict[str, Any], heads: int) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    found = sharding(config, {name: (32, 8)}, Parallel(4))
    rows = [reads(found, name, rank).any(1).nonzero()[0].tolist() for rank in range(4)]
    assert list(found.unknown) == ([] if heads else ["model.layers.#.self_attn.k_proj.weight"])
    if not heads:
        assert rows == [list(range(32))] * 4
    else:
        size = 32 // min(heads, 4)
        assert rows == [
            list(range((begin := rank * heads // 4 * (32 // heads)), begin + size))
            for rank in range(4)
        ]


def test_groups_of_queries_keys_and_values() -> None:
    """internlm2's wqkv, falcon-40b's and GPT-NeoX's query_key_value."""
    for name, heads, key_value in [
        ("model.layers.0.attention.wqkv.weight", 8, 4),
        ("transformer.h.0.self_attention.query_key_value.weight", 8, 2),
        ("gpt_neox.layers.0.attention.query_key_value.weight", 8, 8),
    ]:
        rows = (heads + 2 * key_value) * 2
        config = {"num_attention_heads": heads, "num_key_value_heads": key_value}
        found = sharding(config, {name: (rows, 4)}, Parallel(4))
        group = heads // key_value
        for rank in range(4):
            want = set()
            for query in range(rank * heads // 4, (rank + 1) * heads // 4):
                base = query // group * (group + 2)
                want |= {base + query % group, base + group, base + group + 1}
            got = reads(found, name, rank).any(1).nonzero()[0]
            assert {int(row) // 2 for row in got} == want


def test_names_that_no_table_has_are_whole_and_told(tmp_path: Path) -> None:
    tensors = {"model.layers.0.new_thing.weight": ("BF16", (8, 8)), "norm.weight": ("BF16", (8,))}
    write(tmp_path / "model.safetensors", tensors, hole=False)
    unknown: list[str] = []
    template = templates.derive(resolve(tmp_path), tp=4, unknown=unknown)
    assert unknown == ["model.layers.0.new_thing.weight"]
    assert all(template.of(rank)["length"].sum() == template.size for rank in range(4))
    told = run("template", "derive", str(tmp_path), "--tp", "4", "-o", str(tmp_path / "t"))
    assert "new_thing" in told.err
