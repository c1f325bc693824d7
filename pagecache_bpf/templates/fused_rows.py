# SPDX-License-Identifier: Apache-2.0
"""Layers whose output is several things one after the other, understood by their neighbors' shapes.

State-space layers (Mamba) and linear attention project their input to all that they need by one
matrix.  A rank has an even share of each of its parts.  How large those are follows from the layer
behind them (out_proj, whose input is the values) and from A_log, which has a number for each head
or, in the first Mamba, a row for each channel; where that does not add up the matrix is whole.

Source: vLLM 0.32, mamba_mixer.py, mamba_mixer2.py, gdn/qwen_gdn_linear_attn.py, short_conv.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagecache_bpf.templates.architectures import Cut
from pagecache_bpf.templates.slices import Ranges, Shape, even, halves, joined

FUSED_ROWS = frozenset(
    (Cut.THIRDS, Cut.LINEAR_QKV, Cut.LINEAR_GROUPS, Cut.STATE_SPACE_IN, Cut.STATE_SPACE_CONV)
)
_Part = tuple[int, bool]  # rows, and whether every rank reads all of them


def fused_rows(
    cut: Cut,
    size: int,
    behind: Shape | None,
    decay: Shape | None,
    groups: int | None,
    among: int,
    rank: int,
) -> Ranges | None:
    """Compute a rank's share of a layer's output that has several parts.

    Args:
        cut: one of FUSED_ROWS.
        size: elements of the dimension.
        behind: the shape of the layer behind it: (model's width, its own width).
        decay: the shape of A_log; None where there is none.
        groups: groups of a state-space layer, or heads of a linear attention; None: not known.
        among: ranks that share it.
        rank: one of them.

    Returns:
        The rank's indices; None where the shapes do not fit.
    """
    if cut is Cut.THIRDS:
        return None if size % 3 else _of_parts([(size // 3, False)] * 3, among, rank)
    if cut is Cut.LINEAR_GROUPS:
        return even(size, among, rank) if groups and not (size % groups or groups % among) else None
    if behind is None or len(behind) != 2:
        return None
    width = behind[1]
    if cut is Cut.LINEAR_QKV:  # two of keys' width, then the values
        keys, rest = divmod(size - width, 2)
        if rest or keys < 1:
            return None
        return _of_parts([(keys, False), (keys, False), (width, False)], among, rank)
    if decay is None:
        return None
    if len(decay) == 2:  # Mamba: input and gate; of its convolution the input alone
        if cut is Cut.STATE_SPACE_IN:
            return halves(size, among, rank) if size == 2 * width else None
        return even(size, among, rank) if size == width else None
    heads = decay[0]
    within = 2 * width + heads if cut is Cut.STATE_SPACE_IN else width
    states, rest = divmod(size - within, 2)
    if rest or states < 1:
        return None
    copied = not groups or groups % among != 0
    parts: list[_Part] = [(width, False), (states, copied), (states, copied)]
    if cut is Cut.STATE_SPACE_IN:
        parts = [(width, False), *parts, (heads, False)]
    return _of_parts(parts, among, rank)


def _of_parts(parts: Sequence[_Part], among: int, rank: int) -> Ranges | None:
    """Return a rank's share of each of several parts; None where one does not divide."""
    begin, found = 0, []
    for rows, copied in parts:
        share = [(0, rows)] if copied else even(rows, among, rank)
        if share is None:
            return None
        found += [(begin + first, begin + last) for first, last in share]
        begin += rows
    return joined(found)
