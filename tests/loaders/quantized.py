# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with quantized layers: the names, types and shapes that quantizers publish.

Numbers do not matter here, since a loader copies them as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_GROUP, _BLOCK = 128, 128
_CT_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}

Tensors = dict[str, Any]


def _blocks(weight: Any) -> Tensors:
    import torch

    rows, columns = (-(-size // _BLOCK) for size in weight.shape)
    return {
        "weight": weight.to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.ones(rows, columns),
    }


def _channels(weight: Any) -> Tensors:
    import torch

    scale = torch.ones(weight.shape[0], 1, dtype=torch.bfloat16)
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": scale}


def _packed(weight: Any) -> Tensors:
    import torch

    rows, columns = weight.shape
    return {
        "weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        "weight_scale": torch.ones(rows, columns // _GROUP, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _nvfp4(weight: Any) -> Tensors:
    import torch

    rows, columns = weight.shape
    return {
        "weight_packed": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
        "input_global_scale": torch.ones(1),
    }


def _awq(weight: Any) -> Tensors:
    import torch

    rows, columns = weight.shape
    return {
        "qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        "qzeros": torch.zeros(columns // _GROUP, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // _GROUP, rows, dtype=torch.float16),
    }


def _gptq(weight: Any) -> Tensors:
    import torch

    rows, columns = weight.shape
    return {
        "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        "qzeros": torch.zeros(columns // _GROUP, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // _GROUP, rows, dtype=torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // _GROUP,
    }


def mxfp4_experts(name: str, weight: Any) -> Tensors:
    """Return all experts of a layer as OpenAI publishes gpt-oss: blocks of 32, turned, and scales.

    Args:
        name: "...experts.gate_up_proj" or "...experts.down_proj".
        weight: (experts, inputs, outputs).
    """
    import torch

    experts, inputs, outputs = weight.shape
    blocks = inputs // 32
    return {
        f"{name}_blocks": torch.zeros(experts, outputs, blocks, 16, dtype=torch.uint8),
        f"{name}_scales": torch.full((experts, outputs, blocks), 127, dtype=torch.uint8),
    }


def _compressed(layout: str, weights: dict[str, Any], inputs: Any = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
_PLAIN = {"bits": 4, "group_size": _GROUP}
#: By name: what a layer's weight becomes, and what config.json says of it.
METHODS: dict[str, tuple[Callable[[Any], Tensors], dict[str, Any]]] = {
    "fp8-blocks": (
        _blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "fp8-channels": (
        _channels,
        _compressed(
            "float-quantized",
            {**_FP8, "strategy": "channel"},
            {**_FP8, "strategy": "token", "dynamic": True},
        ),
    ),
    "int4-packed": (
        _packed,
        _compressed("pack-quantized", {**_CT_WEIGHTS, "group_size": _GROUP}),
    ),
    "nvfp4": (
        _nvfp4,
        _compressed(
            "nvfp4-pack-quantized",
            {**_FP4, "group_size": 16},
            {**_FP4, "group_size": 16, "dynamic": "local"},
        ),
    ),
    "awq": (_awq, {"quant_method": "awq", **_PLAIN, "zero_point": True, "version": "gemm"}),
    "gptq": (_gptq, {"quant_method": "gptq", **_PLAIN, "sym": True, "desc_act": False}),
    "mxfp4": (
        lambda weight: {"weight": weight},
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    ),
}


def quantize(method: str, source: Path, directory: Path) -> Path:
    """Copy a checkpoint with its layers quantized; needs an environment with torch.

    Args:
        method: one of METHODS.
        source: the checkpoint; its embedding, output layer, norms and routers stay as they are.
        directory: where the copy is made, in a directory with its name and the method's.

    Returns:
        Its directory.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    convert, described = METHODS[method]
    half = torch.float16 if method.startswith(("awq", "gptq")) else torch.bfloat16
    path = directory / f"{source.name}-{method}"
    path.mkdir()
    names: dict[str, str] = {}
    for number, shard in enumerate(sorted(source.glob("*.safetensors"))):
        made: Tensors = {}
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                weight = file.get_tensor(name).to(half)
                if method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
                    made |= mxfp4_experts(name, weight)
                elif weight.ndim == 2 and "_proj." in name:
                    base = name.removesuffix("weight")
                    made |= {base + suffix: made_of for suffix, made_of in convert(weight).items()}
                else:
                    made[name] = weight
        save_file(made, path / f"model-{number}.safetensors")
        names |= dict.fromkeys(made, f"model-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": described, "torch_dtype": str(half).removeprefix("torch.")}
    config.pop("dtype", None)
    (path / "config.json").write_text(json.dumps(config))
    shutil.rmtree(source)
    return path
