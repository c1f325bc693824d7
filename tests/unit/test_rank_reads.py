# SPDX-License-Identifier: Apache-2.0
"""What a rank reads of a model: architectures, quantizations, and all three kinds of parallelism.

needed: bytes that the layer definitions give, in `tests/cases/rank_reads.json` those of vLLM's
Column-, Row-, QKV-, Replicated- and VocabParallel layers, computed without this project.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagecache_bpf import templates
from pagecache_bpf.errors import UsageError
from pagecache_bpf.templates.parallel import Parallel
from pagecache_bpf.templates.sharding import Sharding
from pagecache_bpf.templates.template import STRIDED, Template, expanded, union
from pagecache_bpf.weights.models import resolve
from tests.unit.command import run
from tests.unit.rank_parts import BYTES, covered, reads, sharding, write

CASES: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "cases" / "rank_reads.json").read_text()
)


@pytest.mark.parametrize("case", CASES)
def test_no_byte_is_left_out_and_none_too_many(case: str) -> None:
    described = CASES[case]
    tensors = described["tensors"]
    shapes = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    found = sharding(next(iter(described["files"].values())), shapes, Parallel(described["tp"]))
    for name, tensor in tensors.items():
        length = math.prod(tensor["shape"]) * BYTES[tensor["dtype"]]
        pieces = found.pieces(name, shapes[name], length)
        for rank, needed in enumerate(tensor["needed"]):
            want = covered(needed, length)
            got = covered([(p.offset, p.length, p.rows, p.stride) for p in pieces[rank]], length)
            assert not (want & ~got).any(), (name, rank)
            # Of Conv1D's fused c_attn both readings of its layout are read, see sharding.py; of
            # Mistral's own wq and wk vLLM reads all (tests/loaders).
            more = {"gpt2": (".c_attn.",), "mistral_consolidated": (".wq.", ".wk.")}.get(case, ())
            if not any(part in name for part in more):
                assert not (got & ~want).any(), (name, rank)
    # Its configuration does not say how many heads the linear attention has.
    told = ["model.layers.0.linear_attn.in_proj_qkvz.weight"] if case == "qwen3next" else []
    assert list(found.unknown.values()) == told


def test_the_command_has_the_same_bytes(tmp_path: Path) -> None:
    """template derive --gap 0, as cases/check.py asks it."""
    case = CASES["phi3"]
    tensors = {name: (t["dtype"], tuple(t["shape"])) for name, t in case["tensors"].items()}
    base = write(tmp_path / "model.safetensors", tensors, hole=False)
    (tmp_path / "config.json").write_text(json.dumps(case["files"]["config.json"]))
    size = (tmp_path / "model.safetensors").stat().st_size
    for rank in range(case["tp"]):
        told = run(
            *("template", "derive", str(tmp_path), "--tp", "4", "--rank", str(rank)),
            *("--gap", "0", "-o", str(tmp_path / "t")),
        )
        assert told.code == 0, told.err
        template = templates.read(tmp_path / "t")
        got = np.zeros(size, bool)
        for extent in template.plain():
            got[int(extent["offset"]) :][: int(extent["length"])] = True
        at, want = base, np.zeros(size, bool)
        want[:base] = True
        for name, (kind, shape) in tensors.items():
            length = math.prod(shape) * BYTES[kind]
            want[at : at + length] = covered(case["tensors"][name]["needed"][rank], length)
            want[at] = True  # which get_tensor() looks at
            at += length
        assert (got == want).all()


# Parallelism.

MOE = {
    **{
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (8, 16)
        for layer in range(3)
        for expert in range(10)
        for name in ("gate_proj", "up_proj")
    },
    "model.layers.0.self_attn.q_proj.weight": (32, 16),
    "model.layers.0.mlp.shared_expert.gate_proj.weight": (8, 16),
    "model.layers.0.mlp.gate.weight": (10, 16),
}


def experts_read(found: Sharding, rank: int, layer: int = 0) -> set[int]:
    names = {f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight": n for n in range(10)}
    return {n for name, n in names.items() if reads(found, name, rank).all()}


@pytest.mark.parametrize(
    ("ep", "redundant", "wanted"),
    [
        (2, (), [{0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}]),
        (4, (), [{0, 1, 2}, {3, 4, 5}, {6, 7}, {8, 9}]),
        (4, (0, 1), [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 0, 1}]),
    ],
)
def test_experts_of_a_rank(ep: int, redundant: tuple[int, ...], wanted: list[set[int]]) -> None:
    found = sharding({}, MOE, Parallel(tp=ep, ep=ep, redundant=redundant))
    assert [experts_read(found, rank) for rank in range(ep)] == wanted
    for rank in range(ep):  # what is no expert is cut as without
        assert reads(found, "model.layers.0.self_attn.q_proj.weight", rank).sum() == 512 // ep
        assert reads(found, "model.layers.0.mlp.shared_expert.gate_proj.weight", rank).any(1).sum()
        assert reads(found, "model.layers.0.mlp.gate.weight", rank).all()


def test_fewer_expert_ranks_than_tensor_ranks_cut_the_experts_too() -> None:
    found = sharding({}, MOE, Parallel(tp=4, ep=2))
    name = "model.layers.0.mlp.experts.7.up_proj.weight"
    rows = [reads(found, name, rank).any(1).nonzero()[0].tolist() for rank in range(4)]
    assert rows == [[], [], [0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("parallel", [Parallel(4), Parallel(2, 4), Parallel(2, 2, 3)])
def test_all_ranks_together_read_everything(parallel: Parallel) -> None:
    found = sharding({"num_key_value_heads": 2}, MOE, parallel)
    for name, shape in MOE.items():
        union_of_ranks = np.zeros(shape, bool)
        for rank in range(parallel.world):
            union_of_ranks |= reads(found, name, rank)
        assert union_of_ranks.all(), name


_DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 3}
_QWEN = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 3}
_ENDS = {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16)}


@pytest.mark.parametrize("config", [_DEEPSEEK, _QWEN])
@pytest.mark.parametrize(
    "parallel",
    [
        *(Parallel(2, 1, 3), Parallel(4, 2, 3), Parallel(2, 2, 2), Parallel(2, 4, 3)),
        *(Parallel(4, 4, 2, redundant=(0, 1)), Parallel(8, 8, 3), Parallel(1, 2, 3, (1, 1, 1))),
    ],
)
def test_all_three_together_are_each_by_itself(config: dict[str, Any], parallel: Parallel) -> None:
    """A rank reads of the layers of its stage what it would read of them without a pipeline."""
    shapes = {**MOE, **_ENDS}
    config = {**config, "num_key_value_heads": 2}
    all_three = sharding(config, shapes, parallel)
    layers = sharding(config, shapes, Parallel(pp=parallel.pp, pp_layers=parallel.pp_layers))
    within = sharding(
        config, shapes, Parallel(parallel.tp, parallel.ep, redundant=parallel.redundant)
    )
    ranks = range(parallel.world)
    local = parallel.world // parallel.pp
    for name, shape in shapes.items():
        at_once = [reads(all_three, name, rank) for rank in ranks]
        for rank in ranks:
            stage = reads(layers, name, rank // local).all()
            alone = reads(within, name, rank % local)
            assert (at_once[rank] == (alone if stage else False)).all(), (name, rank)
        # Nothing is left out, and nothing is read by more ranks than have a use for it.
        assert np.logical_or.reduce(at_once).all(), name
        copies = (
            parallel.pp
            if name in _ENDS and config["architectures"] == _QWEN["architectures"]
            else 1
        )
        if name in _ENDS and local == parallel.tp:
            assert (np.sum(at_once, 0) == copies).all(), name
        if ".experts." in name and not parallel.redundant:
            assert np.sum(at_once) == math.prod(shape), name


def test_all_experts_in_one_tensor() -> None:
    shapes = {
        "l.experts.gate_up_proj": (8, 12, 6),
        "l.experts.down_proj": (8, 6, 6),
        "t.experts.gate_up_proj": (8, 6, 24),
        "t.experts.down_proj": (8, 12, 6),
        "q.experts.gate_up_proj": (8, 12, 12),
        "q.experts.down_proj": (8, 12, 12),
    }
    found = sharding({"num_local_experts": 8}, shapes, Parallel(4, 4))
    for name in shapes:
        parts = [reads(found, name, rank) for rank in range(4)]
        assert all(part[2 * rank : 2 * rank + 2].all() for rank, part in enumerate(parts))
        assert sum(int(part.sum()) for part in parts) == math.prod(shapes[name])
    found = sharding({"num_local_experts": 8}, shapes, Parallel(2))
    assert reads(found, "l.experts.gate_up_proj", 1)[:, [3, 4, 5, 9, 10, 11]].all()
    assert reads(found, "l.experts.gate_up_proj", 1).sum() == 8 * 6 * 6
    assert reads(found, "t.experts.gate_up_proj", 1)[:, :, [6, 11, 18, 23]].all()
    assert reads(found, "t.experts.gate_up_proj", 1).sum() == 8 * 6 * 12
    assert reads(found, "t.experts.down_proj", 0)[:, :6].all()
    # Where the shapes fit neither way, or both, the tensor is whole.
    assert reads(found, "q.experts.gate_up_proj", 0).all()


def test_stages_of_the_pipeline() -> None:
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (8, 8) for n in range(7)}
    shapes |= {"model.embed_tokens.weight": (64, 8), "lm_head.weight": (64, 8)}
    shapes |= {"visual.blocks.0.mlp.fc1.weight": (8, 8)}
    llama = {"num_hidden_layers": 7, "architectures": ["LlamaForCausalLM"]}
    found = sharding(llama, shapes, Parallel(pp=3))

    def layers(of: Sharding, rank: int) -> list[int]:
        names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(7)]
        return [number for number, name in enumerate(names) if reads(of, name, rank).any()]

    # vLLM: what does not divide goes to the stages before the last one.
    assert [layers(found, rank) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6]]
    assert [reads(found, "model.embed_tokens.weight", rank).any() for rank in range(3)] == [
        *(True, False, False)
    ]
    assert [reads(found, "lm_head.weight", rank).any() for rank in range(3)] == [False, False, True]
    assert all(reads(found, "visual.blocks.0.mlp.fc1.weight", rank).all() for rank in range(3))
    # Of what is not known each stage may need both ends, as vLLM's Qwen3-MoE does.
    qwen = {"num_hidden_layers": 7, "architectures": ["Qwen3MoeForCausalLM"]}
    for config in (qwen, {}):
        other = sharding(config, shapes, Parallel(pp=3))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert all(reads(other, name, rank).all() for rank in range(3))
    given = sharding({}, shapes, Parallel(pp=2, pp_layers=(6, 1)))
    assert [layers(given, rank) for rank in range(2)] == [[0, 1, 2, 3, 4, 5], [6]]
    del shapes["lm_head.weight"]
    tied = sharding(llama, shapes, Parallel(pp=3))
    ends = [reads(tied, "model.embed_tokens.weight", rank).all() for rank in range(3)]
    assert ends == [True, False, True]


@pytest.mark.parametrize(
    "wrong",
    [{"tp": 6, "ep": 4}, {"tp": 0}, {"tp": 2048}, {"pp": 2, "pp_layers": (1, 2, 3)}],
)
def test_parallelism_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Parallel(**wrong)


# Strided extents.


def test_strided_extents_are_the_same_as_their_rows() -> None:
    generator = np.random.default_rng(7)
    for _ in range(200):
        rows = []
        for _ in range(int(generator.integers(1, 6))):
            length, count = (int(number) for number in generator.integers(1, 6, 2))
            stride = length + int(generator.integers(0, 5))
            offset = int(generator.integers(0, 60))
            rows.append((0, 0, offset, length, length * count, count, stride))
        extents = np.array(rows, STRIDED)
        want = np.zeros(200, bool)
        for extent in expanded(extents):
            want[int(extent["offset"]) :][: int(extent["length"])] = True
        parts = union(extents)
        assert (covered(parts, 200) == want).all()
        assert sum(length * count for _, length, count, _ in parts) == want.sum()


def llama_405b(root: Path) -> None:
    """The shapes of Llama-3.1-405B, in files of holes."""
    hidden, inner, layers = 16384, 53248, 126
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = []
    for layer in range(layers):
        base = f"model.layers.{layer}"
        shards.append(
            {
                f"{base}.self_attn.q_proj.weight": ("BF16", (hidden, hidden)),
                f"{base}.self_attn.k_proj.weight": ("BF16", (1024, hidden)),
                f"{base}.self_attn.v_proj.weight": ("BF16", (1024, hidden)),
                f"{base}.self_attn.o_proj.weight": ("BF16", (hidden, hidden)),
                f"{base}.mlp.gate_proj.weight": ("BF16", (inner, hidden)),
                f"{base}.mlp.up_proj.weight": ("BF16", (inner, hidden)),
                f"{base}.mlp.down_proj.weight": ("BF16", (hidden, inner)),
                f"{base}.input_layernorm.weight": ("BF16", (hidden,)),
            }
        )
    shards.append({"model.embed_tokens.weight": ("BF16", (128256, hidden))})
    shards.append({"lm_head.weight": ("BF16", (128256, hidden))})
    _write_shards(root, shards)
    config = {"num_key_value_heads": 8, "num_attention_heads": 128, "num_hidden_layers": 126}
    (root / "config.json").write_text(json.dumps(config))


def deepseek_v3(root: Path, nr_layers: int = 61) -> None:
    """The shapes of DeepSeek-V3 with its block scales, in files of holes."""
    hidden, shards = 7168, []
    for layer in range(nr_layers):
        base = f"model.layers.{layer}"
        layers: dict[str, tuple[int, int]] = {
            "self_attn.q_a_proj": (1536, hidden),
            "self_attn.q_b_proj": (24576, 1536),
            "self_attn.kv_a_proj_with_mqa": (576, hidden),
            "self_attn.kv_b_proj": (32768, 512),
            "self_attn.o_proj": (hidden, 16384),
        }
        if layer >= 3:
            for expert in (*(f"experts.{number}" for number in range(256)), "shared_experts"):
                layers[f"mlp.{expert}.gate_proj"] = (2048, hidden)
                layers[f"mlp.{expert}.up_proj"] = (2048, hidden)
                layers[f"mlp.{expert}.down_proj"] = (hidden, 2048)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{base}.input_layernorm.weight": ("BF16", (hidden,))
        }
        for name, (rows, columns) in layers.items():
            tensors[f"{base}.{name}.weight"] = ("F8_E4M3", (rows, columns))
            blocks = (-(-rows // 128), -(-columns // 128))
            tensors[f"{base}.{name}.weight_scale_inv"] = ("F32", blocks)
        shards.append(tensors)
    _write_shards(root, shards)
    config = {
        "n_routed_experts": 256,
        "num_hidden_layers": nr_layers,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (root / "config.json").write_text(json.dumps(config))


def _write_shards(root: Path, shards: list[dict[str, tuple[str, tuple[int, ...]]]]) -> None:
    count = len(shards)
    for number, tensors in enumerate(shards, 1):
        write(root / f"model-{number:05}-of-{count:05}.safetensors", tensors, hole=True)


def peak_of(root: Path, parallel: Parallel) -> tuple[Template, int]:
    """The template without gaps, and the most memory that Python held for it, in bytes."""
    model = resolve(root)
    tracemalloc.start()
    template = templates.derive(model, parallel=parallel, gap=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return template, peak


@pytest.mark.parametrize("tp", [8, 16])
def test_a_405b_model_is_derived_by_arithmetic(tmp_path: Path, tp: int) -> None:
    llama_405b(tmp_path)
    template, peak = peak_of(tmp_path, Parallel(tp))
    assert peak < 300 << 20
    assert len(template.extents) < 200 * 10 * tp
    # Every rank has its share and what all have: no row is left out, none is read along.
    assert template.distinct == template.size
    share = template.size / tp
    for rank in range(tp):
        own = template.extents[template.extents["consumer"] == rank]
        read = int((own["length"] * own["count"]).sum())
        assert read <= 1.02 * int(own["wanted"].sum())
        assert share <= read <= share * 1.02 * (1 if tp == 8 else 1.01)


def test_a_671b_model_by_experts(tmp_path: Path) -> None:
    deepseek_v3(tmp_path, nr_layers=6)  # whole it takes a few seconds of a CPU, and 97 MiB
    template = templates.derive(resolve(tmp_path), parallel=Parallel(8, 8), gap=0)
    assert template.distinct == template.size
    share = template.size / 8
    for rank in range(8):
        own = template.extents[template.extents["consumer"] == rank]
        wanted = int(own["wanted"].sum())
        # Experts are whole; routers, norms and latent projections are everybody's.
        assert share <= wanted <= 1.1 * share
