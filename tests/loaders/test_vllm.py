# SPDX-License-Identifier: Apache-2.0
"""Each rank of vLLM reads the pages of its derived template, and tensors in its order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cachestat import drop
from tests.loaders import checkpoints, quantized
from tests.loaders.page_trace import PageTrace
from tests.loaders.reads import expected, header, packed, tensors_of, without
from tests.loaders.vllm_ranks import Ranks

_TP, _EP, _PP, _TP_PP, _TP_EP_PP = (
    {"tp": 2, "ep": 1, "pp": 1},
    {"tp": 2, "ep": 2, "pp": 1},
    {"tp": 1, "ep": 1, "pp": 2},
    {"tp": 2, "ep": 1, "pp": 2},
    {"tp": 2, "ep": 2, "pp": 2},
)
CASES = [
    *((name, _TP) for name in checkpoints.MODELS),
    *(
        (name, _EP)
        for name in ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "gpt_oss")
    ),
    *((name, _EP) for name in ("phimoe", "minimax_m2", "ernie4_5_moe", "glm4_moe", "llama4")),
    *((name, _EP) for name in ("granitemoehybrid", "qwen3_next", "lfm2_moe", "jamba")),
    ("glm4_moe_lite", _EP),
    *((name, _PP) for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "granite")),
    *((name, _PP) for name in ("glm4", "nemotron", "mixtral", "qwen3_moe", "gpt_oss")),
    ("deepseek_v3", _PP),
    ("mistral-consolidated", _TP),
    *((name, _PP) for name in ("mistral-consolidated", "llama4", "minimax_m2", "exaone4", "jamba")),
    *((name, _PP) for name in ("phi3", "gpt_neox", "olmo2", "bloom", "falcon", "qwen3_next")),
    *((f"llama-wide:{method}", _TP) for method in quantized.METHODS if method != "mxfp4"),
    *((f"qwen3_moe:{method}", _TP) for method in ("fp8-blocks", "int4-packed")),
    *((f"{name}:fp8-blocks", _EP) for name in ("qwen3_moe", "deepseek_v3")),
    *(("gpt_oss:mxfp4", parallel) for parallel in (_TP, _EP)),
    *((name, _TP_PP) for name in ("llama", "llama-tied", "qwen3_moe")),
    *((name, _TP_EP_PP) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss")),
]
#: What templates have although this vLLM does not read it, by the end of the case's name: the order
#: of a layer's groups where it is the usual one, which other releases read; a small layer that is
#: not cut if the model is quantized.
MORE = {":gptq": ".g_idx", "qwen3_next": ".in_proj_ba.weight"}


def _name(case: tuple[str, dict[str, int]]) -> str:
    name, parallel = case
    return "-".join([name, *(f"{kind}{count}" for kind, count in parallel.items() if count > 1)])


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, disk: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint on the cold disk."""
    name, _, method = request.param[0].partition(":")
    if method:
        made = quantized.quantize(method, checkpoints.make(name, tmp_path), tmp_path)
    elif name == "mistral-consolidated":
        made = checkpoints.consolidated(name, checkpoints.make("llama", tmp_path), tmp_path)
    else:
        made = checkpoints.make(name, tmp_path)
    with checkpoints.moved(made, disk) as path:
        yield path


@pytest.mark.parametrize(
    ("checkpoint", "case"), [(c, c) for c in CASES], ids=map(_name, CASES), indirect=["checkpoint"]
)
def test_a_rank_reads_what_its_template_says(
    checkpoint: Path,
    case: tuple[str, dict[str, int]],
    ranks: Callable[[int], Ranks],
    trace: PageTrace,
    reads: dict[str, Any],
) -> None:
    name, parallel = case
    more = next((MORE[end] for end in MORE if name.endswith(end)), None)
    files = {path.stat().st_ino: path for path in sorted(checkpoint.glob("*.safetensors"))}
    headers = {path.name: header(path) for path in files.values()}
    own = {}
    if (checkpoint / "params.json").exists():
        own = {"load_format": "mistral", "config_format": "mistral"}
    if name.endswith((":awq", ":gptq")):
        own = {"dtype": "float16"}
    found = []
    world = parallel["tp"] * parallel["pp"]
    vllm = ranks(world)
    try:
        vllm.build(checkpoint, parallel["tp"], parallel["pp"], parallel["ep"] > 1, **own)
        for rank in range(world):
            drop(files.values())
            with trace.record() as touches:
                vllm.load(rank)
            read = [(files[inode].name, page) for inode, page in touches if inode in files]
            assert len(read) == len(set(read)), "a page was dropped while it was traced"
            pages = {file: packed(page for at, page in read if at == file) for file in headers}
            found.append({"pages": pages, "tensors": tensors_of(read, headers)})
            template = expected(checkpoint, parallel, rank)
            left_out = set(read) - set(template)
            assert not left_out, (rank, tensors_of(sorted(left_out), headers))
            too_much = tensors_of(sorted(set(template) - set(read)), headers)
            assert not without(too_much, more), rank
            told = tensors_of(template, headers)
            assert without(told, more) == without(tensors_of(read, headers), more)
    finally:
        vllm.drop()
    configs = [checkpoint / name for name in ("config.json", "params.json")]
    config = {path.name: json.loads(path.read_text()) for path in configs if path.exists()}
    described = {**parallel, "config": config, "files": headers, "ranks": found}
    reads[_name(case)] = {**described, "more": more} if more else described
