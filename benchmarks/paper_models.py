# SPDX-License-Identifier: Apache-2.0
"""The models of the paper (PPC and MAIO, FAST '26, Table 3), as their headers have them.

The files are sparse: a template is derived from the headers, and there is nothing else in them.
Names, shapes and the sharding by size are those of the published checkpoints; DeepSeek-R1's are in
FP8 with a scale for each 128 x 128 block, all others in bfloat16.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SIZES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
Entry = tuple[str, str, tuple[int, ...]]  # name, type, shape


@dataclass(frozen=True)
class Shape:
    """A dense decoder: the numbers of its configuration, bytes of a shard, biases of q, k and v."""

    hidden: int
    ffn: int
    layers: int
    kv: int
    vocab: int
    shard: int
    biases: bool = False

    def entries(self) -> Iterator[Entry]:
        """Yield its tensors, layer by layer."""
        yield "model.embed_tokens.weight", "BF16", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", "BF16", (self.hidden,)
            yield prefix + "mlp.down_proj.weight", "BF16", (self.hidden, self.ffn)
            yield prefix + "mlp.gate_proj.weight", "BF16", (self.ffn, self.hidden)
            yield prefix + "mlp.up_proj.weight", "BF16", (self.ffn, self.hidden)
            yield prefix + "post_attention_layernorm.weight", "BF16", (self.hidden,)
            rows_of = {"k": self.kv, "o": self.hidden, "q": self.hidden, "v": self.kv}
            for name, rows in rows_of.items():
                yield f"{prefix}self_attn.{name}_proj.weight", "BF16", (rows, self.hidden)
                if self.biases and name != "o":
                    yield f"{prefix}self_attn.{name}_proj.bias", "BF16", (rows,)
        yield "model.norm.weight", "BF16", (self.hidden,)
        yield "lm_head.weight", "BF16", (self.vocab, self.hidden)


@dataclass(frozen=True)
class Experts:
    """DeepSeek-R1: latent attention, 3 dense layers, then 256 experts and a shared one in each.

    The multi-token prediction layer (61) is a layer like the others, with four tensors more.
    """

    hidden: int = 7168
    ffn: int = 18432
    expert: int = 2048
    layers: int = 62
    experts: int = 256
    vocab: int = 129280
    shard: int = 4_300_000_000

    def entries(self) -> Iterator[Entry]:
        """Yield its tensors, layer by layer."""
        yield "model.embed_tokens.weight", "BF16", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", "BF16", (self.hidden,)
            yield prefix + "post_attention_layernorm.weight", "BF16", (self.hidden,)
            attention = prefix + "self_attn."
            yield attention + "q_a_layernorm.weight", "BF16", (1536,)
            yield attention + "kv_a_layernorm.weight", "BF16", (512,)
            yield from _blocks(attention + "q_a_proj", 1536, self.hidden)
            yield from _blocks(attention + "q_b_proj", 24576, 1536)
            yield from _blocks(attention + "kv_a_proj_with_mqa", 576, self.hidden)
            yield from _blocks(attention + "kv_b_proj", 32768, 512)
            yield from _blocks(attention + "o_proj", self.hidden, 16384)
            if layer < 3:
                yield from self._mlp(prefix + "mlp.", self.ffn)
                continue
            yield prefix + "mlp.gate.weight", "BF16", (self.experts, self.hidden)
            yield prefix + "mlp.gate.e_score_correction_bias", "F32", (self.experts,)
            yield from self._mlp(prefix + "mlp.shared_experts.", self.expert)
            for number in range(self.experts):
                yield from self._mlp(f"{prefix}mlp.experts.{number}.", self.expert)
        prefix = f"model.layers.{self.layers - 1}."
        for name, rows in (("embed_tokens", self.vocab), ("shared_head.head", self.vocab)):
            yield f"{prefix}{name}.weight", "BF16", (rows, self.hidden)
        yield prefix + "eh_proj.weight", "BF16", (self.hidden, 2 * self.hidden)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}{name}.weight", "BF16", (self.hidden,)
        yield "model.norm.weight", "BF16", (self.hidden,)
        yield "lm_head.weight", "BF16", (self.vocab, self.hidden)

    def _mlp(self, prefix: str, ffn: int) -> Iterator[Entry]:
        yield from _blocks(prefix + "gate_proj", ffn, self.hidden)
        yield from _blocks(prefix + "up_proj", ffn, self.hidden)
        yield from _blocks(prefix + "down_proj", self.hidden, ffn)


def _blocks(name: str, rows: int, columns: int) -> Iterator[Entry]:
    yield name + ".weight", "F8_E4M3", (rows, columns)
    yield name + ".weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


#: By name; the bytes of a template and of the model that the paper's Table 3 has, in KB and GB.
MODELS: dict[str, tuple[Shape | Experts, int, int]] = {
    "Qwen2.5-7B": (Shape(3584, 18944, 28, 512, 152064, 3_950_000_000, True), 11, 15),
    "Qwen2.5-32B": (Shape(5120, 27648, 64, 1024, 152064, 3_950_000_000, True), 32, 62),
    "Qwen2.5-72B": (Shape(8192, 29568, 80, 1024, 152064, 4_000_000_000, True), 95, 136),
    "Llama-7B (3.1-8B)": (Shape(4096, 14336, 32, 1024, 128256, 5_000_000_000), 14, 15),
    "Llama-70B (3.1)": (Shape(8192, 28672, 80, 1024, 128256, 5_000_000_000), 118, 132),
    "DeepSeek-R1": (Experts(), 545, 662),
}


def write(shape: Shape | Experts, root: Path) -> int:
    """Write the headers of a model into a directory, as sparse files.

    Args:
        shape: of the model.
        root: an empty directory.

    Returns:
        The model's bytes.
    """
    runs: list[list[tuple[Entry, int]]] = [[]]
    held = 0
    for name, kind, dims in shape.entries():
        size = math.prod(dims) * _SIZES[kind]
        if held and held + size > shape.shard:
            runs.append([])
            held = 0
        runs[-1].append(((name, kind, dims), size))
        held += size
    total = 0
    weight_map: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        file_name = f"model-{number:05d}-of-{len(runs):06d}.safetensors"
        header: dict[str, object] = {}
        offset = 0
        for (name, kind, dims), size in sorted(run):
            header[name] = {"dtype": kind, "shape": dims, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file_name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (root / file_name).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
        total += 8 + len(text) + offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
