# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of real architectures: made by transformers' own classes, with its own names.

Rows are long (several pages), so that slices by columns lie in pages of their own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROWS = {
    "hidden_size": 256,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 512,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
_EXPERTS = {"moe_intermediate_size": 4096, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_ROWS,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 4096,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 512,
    "n_group": 1,
    "topk_group": 1,
}

_WIDE = {**_ROWS, "hidden_size": 1024, "head_dim": 64}
_LOCAL = {**_WIDE, "intermediate_size": 4096, "num_local_experts": 4}
_ROUTED = {"moe_intermediate_size": 4096, "num_experts_per_tok": 2}

#: Checkpoints by their name: transformers' model_type and what its configuration is given.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _ROWS),
    "llama-wide": ("llama", {**_ROWS, "intermediate_size": 32768}),
    "llama-tied": ("llama", {**_ROWS, "tie_word_embeddings": True, "vocab_size": 1024}),
    "mistral": ("mistral", _ROWS),
    "qwen2": ("qwen2", {**_ROWS, "num_attention_heads": 16, "hidden_size": 1024, "head_dim": 64}),
    "qwen3": ("qwen3", _ROWS),
    "gemma2": ("gemma2", _ROWS),
    "gemma3": ("gemma3_text", _ROWS),
    "phi3": ("phi3", {**_ROWS, "hidden_size": 1024, "pad_token_id": 0, "head_dim": 64}),
    "granite": ("granite", {**_ROWS, "hidden_size": 1024, "head_dim": 64}),
    "olmo2": ("olmo2", {**_ROWS, "hidden_size": 1024, "head_dim": 64}),
    "cohere": ("cohere", {**_ROWS, "hidden_size": 1024, "head_dim": 64}),
    "glm4": ("glm4", {**_ROWS, "pad_token_id": 0}),
    "stablelm": ("stablelm", {**_ROWS, "hidden_size": 1024, "head_dim": 64}),
    "starcoder2": ("starcoder2", {**_ROWS, "hidden_size": 1024, "head_dim": 64}),
    "nemotron": ("nemotron", _ROWS),
    "gpt2": (
        "gpt2",
        {"n_embd": 1024, "n_layer": 2, "n_head": 16, "vocab_size": 1000, "n_positions": 64},
    ),
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        | {"num_hidden_layers": 2, "vocab_size": 1000},
    ),
    "gptj": (
        "gptj",
        {"n_embd": 1024, "n_layer": 2, "n_head": 16, "vocab_size": 1000, "rotary_dim": 64},
    ),
    "opt": (
        "opt",
        {"hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "num_hidden_layers": 2}
        | {"vocab_size": 1000, "word_embed_proj_dim": 1024},
    ),
    "bloom": ("bloom", {"hidden_size": 1024, "n_layer": 2, "n_head": 16, "vocab_size": 1000}),
    "falcon": (
        "falcon",
        {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 1000}
        | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
    ),
    "falcon-multi-query": (
        "falcon",
        {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 1000}
        | {"multi_query": True, "bias": False},
    ),
    "gpt_bigcode": (
        "gpt_bigcode",
        {"n_embd": 1024, "n_layer": 2, "n_head": 16, "vocab_size": 1000, "n_positions": 64},
    ),
    "mamba": (
        "mamba",
        {"hidden_size": 1024, "num_hidden_layers": 2, "vocab_size": 1000, "state_size": 16},
    ),
    "mixtral": ("mixtral", {**_ROWS, "intermediate_size": 4096, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_ROWS, **_EXPERTS, "hidden_size": 1024, "head_dim": 64}
        | {"shared_expert_intermediate_size": 4096},
    ),
    "qwen3_moe": ("qwen3_moe", {**_ROWS, **_EXPERTS}),
    "olmoe": (
        "olmoe",
        {**_ROWS, "hidden_size": 1024, "head_dim": 64, "intermediate_size": 4096, "num_experts": 4}
        | {"num_key_value_heads": 16},
    ),
    "granitemoe": (
        "granitemoe",
        {
            **_ROWS,
            "hidden_size": 1024,
            "head_dim": 64,
            "intermediate_size": 4096,
            "num_local_experts": 4,
        },
    ),
    "gpt_oss": ("gpt_oss", {**_ROWS, "intermediate_size": 4096, "num_local_experts": 4}),
    "exaone4": ("exaone4", _WIDE),
    "apertus": ("apertus", _WIDE),
    "phimoe": ("phimoe", _LOCAL),
    "minimax_m2": (
        "minimax_m2",
        {**_LOCAL, "num_experts_per_tok": 2, "rotary_dim": 64, "scoring_func": "sigmoid"}
        | {"use_routing_bias": True},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**_WIDE, "moe_intermediate_size": 4096, "moe_num_experts": 4, "moe_k": 2}
        | {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "glm4_moe": (
        "glm4_moe",
        {**_WIDE, **_ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "pad_token_id": 0}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "llama4": (
        "llama4_text",
        {**_LOCAL, "intermediate_size_mlp": 8192, "interleave_moe_layer_step": 1}
        | {"pad_token_id": 0},
    ),
    "granitemoeshared": ("granitemoeshared", {**_LOCAL, "shared_intermediate_size": 2048}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_LOCAL, "shared_intermediate_size": 2048, "layer_types": ["mamba", "attention"]}
        | {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_expand": 2},
    ),
    "qwen3_next": (
        "qwen3_next",
        {**_WIDE, **_EXPERTS, "shared_expert_intermediate_size": 4096, "num_hidden_layers": 4}
        | {"linear_num_key_heads": 8, "linear_num_value_heads": 16}
        | {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {**_WIDE, **_ROUTED, "num_experts": 4, "num_dense_layers": 1}
        | {"layer_types": ["conv", "full_attention"]},
    ),
    "jamba": (
        "jamba",
        {**_WIDE, "intermediate_size": 4096, "num_experts": 2, "use_mamba_kernels": False}
        | {"attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "mamba2": (
        "mamba2",
        {"hidden_size": 1024, "num_hidden_layers": 2, "vocab_size": 1000, "num_heads": 32}
        | {"head_dim": 64, "expand": 2, "n_groups": 1, "state_size": 64},
    ),
    "falcon_h1": (
        "falcon_h1",
        {**_WIDE, "mamba_d_ssm": 1024, "mamba_n_heads": 16, "mamba_d_head": 64}
        | {"mamba_n_groups": 2},
    ),
    "nemotron_h": (
        "nemotron_h",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        | {"num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 3, "vocab_size": 1000}
        | {"hybrid_override_pattern": "M*-", "mamba_num_heads": 32, "mamba_head_dim": 64}
        | {"n_groups": 2},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**_LATENT, "pad_token_id": 0}),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, "topk_method": "noaux_tc"}),
}
#: Those that are no decoders, which transformers alone loads: its class, too.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": (
        "AutoModelForMaskedLM",
        "bert",
        {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        | {"num_hidden_layers": 11, "vocab_size": 1000, "max_position_embeddings": 64},
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        "t5",
        {"d_model": 512, "d_ff": 2048, "num_layers": 3, "num_heads": 8, "vocab_size": 1000},
    ),
}


def make(name: str, directory: Path, shards: str = "48MB") -> Path:
    """Make a checkpoint with transformers; needs its environment.

    Args:
        name: one of MODELS or OTHERS.
        directory: where it is made, in a directory with its name.
        shards: the size of one of its files at most.

    Returns:
        Its directory.
    """
    import torch
    import transformers

    kind, model_type, options = OTHERS.get(name) or ("AutoModelForCausalLM", *MODELS[name])
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(config, dtype=torch.bfloat16)
    path = directory / name
    model.save_pretrained(path, max_shard_size=shards)
    return path


def consolidated(name: str, llama: Path, directory: Path) -> Path:
    """Copy a Llama-shaped checkpoint as Mistral publishes its own: other names, params.json."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((llama / "config.json").read_text())
    names = (
        (r"^model\.", ""),
        (r"embed_tokens", "tok_embeddings"),
        (r"lm_head", "output"),
        (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
        (r"mlp\.gate_proj", "feed_forward.w1"),
        (r"mlp\.down_proj", "feed_forward.w2"),
        (r"mlp\.up_proj", "feed_forward.w3"),
        (r"input_layernorm", "attention_norm"),
        (r"post_attention_layernorm", "ffn_norm"),
    )
    tensors = {}
    for shard in sorted(llama.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dictionary
                new = key
                for pattern, replacement in names:
                    new = re.sub(pattern, replacement, new)
                tensors[new] = file.get_tensor(key)
    path = directory / name
    path.mkdir()
    save_file(tensors, path / "consolidated.safetensors")
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": 1e-5,
        "vocab_size": config["vocab_size"],
        "rope_theta": 10000.0,
    }
    (path / "params.json").write_text(json.dumps(params))
    return path


def header(path: Path) -> Mapping[str, Any]:
    """Return the header of a safetensors file, without its metadata."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        found: dict[str, Any] = json.loads(file.read(size))
    found.pop("__metadata__", None)
    return found


@contextmanager
def moved(source: Path, to: Path) -> Iterator[Path]:
    """Have a checkpoint on another disk; it is removed whatever happens, for the next test."""
    target = to / source.name
    try:
        shutil.copytree(source, target)
        shutil.rmtree(source)
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def deep(directory: Path) -> Path:
    """Make a checkpoint whose tensors come in another order by each rule; needs transformers.

    Of its twelve layers the tenth comes before the second where names are text, and its norms,
    which have a larger type than the rest, lie at the beginning of each of its files.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = {**_ROWS, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 12}
    config = AutoConfig.for_model("llama", **rows)
    path = directory / "deep"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="8MB")
    for shard in path.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in tensors:
            if name.endswith("layernorm.weight"):
                tensors[name] = torch.ones(4096)  # a page, so that it has one of its own
        save_file(tensors, shard, {"format": "pt"})
    return path


def gguf(path: Path) -> Path:
    """Write a Llama-shaped GGUF model with the package of its format; needs gguf.

    Args:
        path: where; tensors are written in an order that is not that of the layers.

    Returns:
        It.
    """
    import numpy as np
    from gguf import GGUFWriter

    hidden, inner, vocabulary, layers = 512, 4096, 1000, 3
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 8)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    shapes: dict[str, tuple[int, ...]] = {"output.weight": (vocabulary, hidden)}
    for layer in reversed(range(layers)):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in (
                ("ffn_down", (hidden, inner)),
                ("ffn_up", (inner, hidden)),
                ("ffn_gate", (inner, hidden)),
                ("ffn_norm", (hidden,)),
                ("attn_norm", (hidden,)),
                ("attn_q", (hidden, hidden)),
                ("attn_k", (hidden // 4, hidden)),
                ("attn_v", (hidden // 4, hidden)),
                ("attn_output", (hidden, hidden)),
            )
        }
    shapes |= {"output_norm.weight": (hidden,), "token_embd.weight": (vocabulary, hidden)}
    for name, shape in shapes.items():
        kind = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor(name, np.zeros(shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
