# SPDX-License-Identifier: Apache-2.0
"""Which part of a tensor a tensor-parallel rank reads, by the usual names of Llama-like models.

Column-parallel layers are split by their first dimension, row-parallel ones by their second
(Shoeybi et al., Megatron-LM, section 3); so do vLLM, SGLang and transformers with tp_plan.
What is not known by its name is read whole by every rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COLUMN = re.compile(
    r"(?:.*\.)?(?:q_proj|gate_proj|up_proj|w1|w3|fc1|dense_h_to_4h|c_fc|wi|wi_0|wi_1|q_b_proj"
    r"|kv_b_proj|embed_tokens|lm_head|wte|tok_embeddings|output|wq|word_embeddings)"
    r"\.(?:weight|bias)"
)
_KEYS_AND_VALUES = re.compile(r"(?:.*\.)?(?:k_proj|v_proj|wk|wv)\.(?:weight|bias)")
_FUSED = re.compile(r"(?:.*\.)?(?:gate_up_proj|w13)\.(?:weight|bias)")
_ROW = re.compile(r"(?:.*\.)?(?:o_proj|down_proj|w2|fc2|dense_4h_to_h|out_proj|wo)\.weight")


@dataclass(frozen=True)
class Config:
    """What a model's configuration says; kv_heads: heads of keys and values, 0: unknown."""

    kv_heads: int = 0


def slices(
    name: str,
    shape: tuple[int, ...],
    itemsize: int,
    length: int,
    config: Config,
    tp: int,
    rank: int,
    gap: int,
) -> list[tuple[int, int, int]]:
    """The parts of a tensor that a rank reads: (offset in it, bytes, bytes really used)."""
    whole = [(0, length, length)]
    if not itemsize or not shape or length % shape[0]:
        return whole
    row = length // shape[0]
    if _COLUMN.fullmatch(name):
        return _rows(shape[0], row, tp, rank) or whole
    if _KEYS_AND_VALUES.fullmatch(name):
        return _heads(shape[0], row, config, tp, rank) or whole
    if _FUSED.fullmatch(name) and shape[0] % (2 * tp) == 0:
        half, part = length // 2, length // 2 // tp
        return [(rank * part, part, part), (half + rank * part, part, part)]
    if _ROW.fullmatch(name) and len(shape) == 2 and shape[1] % tp == 0:
        part = row // tp
        if row - part > gap:
            return [(n * row + rank * part, part, part) for n in range(shape[0])]
        # From the rank's part of the first row to that of the last one.
        covered = (shape[0] - 1) * row + part
        return [(rank * part, covered, shape[0] * part)]
    return whole


def _rows(rows: int, row: int, tp: int, rank: int) -> list[tuple[int, int, int]]:
    """An even share of the rows; of vocabularies that do not divide the last rank has less."""
    share = -(-rows // tp)
    begin, end = min(rows, rank * share), min(rows, (rank + 1) * share)
    return [(begin * row, (end - begin) * row, (end - begin) * row)] if end > begin else []


def _heads(rows: int, row: int, config: Config, tp: int, rank: int) -> list[tuple[int, int, int]]:
    """As rows, but with fewer heads than ranks several ranks read the same head."""
    heads = config.kv_heads
    if heads and heads < tp and tp % heads == 0 and rows % heads == 0:
        part = rows // heads * row
        return [(rank * heads // tp * part, part, part)]
    return _rows(rows, row, tp, rank) if rows % tp == 0 else []
