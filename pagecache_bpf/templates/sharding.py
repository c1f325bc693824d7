# SPDX-License-Identifier: Apache-2.0
"""Which parts of a tensor a rank reads, computed on its shape.

A part is a row of equal pieces: one range, or the same range of every row of a matrix.  Quantized
tensors are cut as the layer they belong to: what stands behind the module's name (qweight, scales,
weight_scale_inv ...) says which dimension is the layer's output and which its input.  In doubt a
tensor is whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pagecache_bpf.templates.architectures import (
    CONV1D,
    GROUPED,
    INTERLEAVED,
    Cut,
    cut_of,
)
from pagecache_bpf.templates.fused_rows import FUSED_ROWS, fused_rows
from pagecache_bpf.templates.model_config import ModelConfig
from pagecache_bpf.templates.parallel import Parallel
from pagecache_bpf.templates.parameters import (
    EXPERTS,
    PARAMETERS,
    SCALES,
    experts_base,
    module_of,
    sibling,
)
from pagecache_bpf.templates.pipeline import Stages
from pagecache_bpf.templates.slices import (
    Piece,
    Ranges,
    Shape,
    by_heads,
    concatenated,
    even,
    grouped,
    halves,
    joined,
    rounded_up,
    split,
    vocabulary,
)

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,5})\.")
_MXFP4_BLOCK = 32
#: Numbers of layers and experts; those in w1 and fc2 are names.
_NUMBERS = re.compile(r"\.\d+(?=\.)")


@dataclass
class Sharding:
    """Cuts the tensors of one model between ranks.

    Attributes:
        config: the model's configuration.
        parallel: how many ranks there are of each kind.
        shapes: of all its tensors, by name: a fused tensor is understood by its neighbors.
        gap: bytes between two pieces that are read along.
        unknown: names of tensors that were taken whole since no table has them or since they do
            not divide as it says, one for each pattern (a name without its numbers).
    """

    config: ModelConfig
    parallel: Parallel
    shapes: Mapping[str, Shape]
    gap: int = 0
    unknown: dict[str, str] = field(default_factory=dict)
    _known: dict[object, list[list[Piece]]] = field(default_factory=dict)
    _cuts: dict[str, Cut | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = self.config.kinds
        method = str(self.config.quantization.get("quant_method", "")).lower()
        #: bitsandbytes packs a matrix into one row of bytes, which vLLM does not cut.
        self.whole = method in ("bitsandbytes", "aqlm", "quip", "hqq", "exl2", "exl3", "torchao")
        self.ordered = bool(self.config.quantization.get("desc_act"))
        self.interleaved = bool(self.kinds & INTERLEAVED)
        self.conv1d = self._has_conv1d()
        numbers = (int(found[1]) for name in self.shapes if (found := _EXPERT.search(name)))
        self.experts = self.config.experts or max(numbers, default=-1) + 1
        self._stages = Stages(self.config, self.parallel, self.shapes)
        self._placed = [
            self.parallel.experts_of(rank, self.experts) for rank in range(self.parallel.ep)
        ]
        self._ranks = [self.parallel.rank(number) for number in range(self.parallel.world)]
        self._having = [
            [(at, rank) for at, rank in enumerate(self._ranks) if expert in self._placed[rank.ep]]
            for expert in range(self.experts if self.parallel.ep > 1 else 0)
        ]

    def _has_conv1d(self) -> bool:
        """Tell whether the layers are Conv1D: by the architecture, else by the bias of one."""
        if self.kinds:
            return bool(self.kinds & CONV1D)
        for name, shape in self.shapes.items():
            if name.endswith(("c_attn.weight", "c_fc.weight")) and len(shape) == 2:
                bias = self.shapes.get(name.removesuffix("weight") + "bias")
                return bias == (shape[1],) and shape[0] != shape[1]
        return False

    def pieces(self, name: str, shape: Shape, length: int) -> list[list[Piece]]:
        """Return what each rank reads of a tensor.

        Args:
            name: the tensor's name.
            shape: its dimensions, the slowest one first; () for a scalar or an unknown shape.
            length: its bytes.

        Returns:
            For each rank of Parallel.world the pieces in their order; none for a rank that has
            another layer or another expert.
        """
        ranks: list[list[Piece]] = [[] for _ in self._ranks]
        for number, found in self.readers(name, shape, length):
            ranks[number] = found
        return ranks

    def readers(self, name: str, shape: Shape, length: int) -> list[tuple[int, list[Piece]]]:
        """Return the ranks that read a tensor, each with its pieces.

        Args:
            name: see pieces(), as the others.
            shape: see pieces().
            length: see pieces().

        Returns:
            Numbers of ranks and the pieces of each; ranks that read nothing of it are left out.
        """
        reordered = self._cuts_of(name) is Cut.REORDERED
        stages = None if reordered else self._stages.of(name)
        if self.parallel.ep > 1:
            expert = _EXPERT.search(name)
            if expert is not None and int(expert[1]) < self.experts:
                ranks = self._having[int(expert[1])]
                found = self._cut(name, shape, length)
                return [
                    (number, found[rank.expert_tp])
                    for number, rank in ranks
                    if stages is None or rank.stage in stages
                ]
            if self._cuts_of(name) in _ALL_EXPERTS:
                return [
                    (number, self._experts_here(name, shape, length, rank.ep, rank.expert_tp))
                    for number, rank in enumerate(self._ranks)
                    if stages is None or rank.stage in stages
                ]
        found = self._cut(name, shape, length)
        return [
            (number, found[rank.tp])
            for number, rank in enumerate(self._ranks)
            if stages is None or rank.stage in stages
        ]

    # Cutting one tensor between the ranks of tensor parallelism.

    def _cuts_of(self, name: str) -> Cut | None:
        """Return how the layer of a tensor is cut, remembered by its name without numbers."""
        pattern = _NUMBERS.sub(".#", name)
        if pattern not in self._cuts:
            module, _ = module_of(name)
            cut = cut_of(module, self.kinds)
            self._cuts[pattern] = cut
            if cut is None:
                self.unknown.setdefault(pattern, name)
        return self._cuts[pattern]

    def _tell(self, name: str) -> None:
        """Remember that a tensor is whole only since it is not understood."""
        self.unknown.setdefault(_NUMBERS.sub(".#", name), name)

    def _cut(self, name: str, shape: Shape, length: int) -> list[list[Piece]]:
        """Return what each of the ranks among which this tensor is cut reads of it."""
        parallel = self.parallel
        among = parallel.tp
        cut = self._cuts_of(name)
        if parallel.ep > 1 and (_EXPERT.search(name) or cut in _ALL_EXPERTS):
            among = parallel.expert_tp
        if among == 1 or self.whole or cut in _UNCUT or not shape or not length:
            if self.whole and among > 1 and cut not in _UNCUT:
                self._tell(name)
            return [[Piece(0, length, length)]] * max(among, parallel.tp)
        assert cut is not None
        key = self._key(name, cut, shape, length, among)
        if key not in self._known:
            parts = [self._of_rank(name, cut, shape, length, among, rank) for rank in range(among)]
            self._known[key] = parts
        return self._known[key]

    def _key(self, name: str, cut: Cut, shape: Shape, length: int, among: int) -> object:
        """Return what a cut depends on, so that each is computed once."""
        module, parameter = module_of(name)
        near = () if cut in _BY_SHAPE and parameter not in SCALES else self._near(module)
        heads: object = None
        if cut in _BY_HEADS:
            heads = (self.config.heads(name), self.config.key_value_heads(name))
        return (_NUMBERS.sub(".#", name), shape, length, among, near, heads)

    def _near(self, module: str) -> tuple[Shape | None, ...]:
        """Return the shapes of neighbors by which a tensor is understood."""
        base = module.rpartition(".")[0]
        names = [f"{module}.weight", f"{base}.gate_up_proj", f"{base}.down_proj"]
        names += [
            f"{base}.A_log",
            f"{base}.down_proj_blocks",
            *(f"{base}.{name}.weight" for name in _OUTPUTS),
        ]
        return tuple(self.shapes.get(name) for name in names)

    def _of_rank(
        self, name: str, cut: Cut, shape: Shape, length: int, among: int, rank: int
    ) -> list[Piece]:
        """Return what one of `among` ranks reads of a tensor."""
        whole = [Piece(0, length, length)]
        module, parameter = module_of(name)
        if cut in _ALL_EXPERTS:
            found = self._of_experts(name, cut, shape, among, rank)
            if found is None:
                if not name.endswith("bias"):  # that of the down projection is everybody's
                    self._tell(name)
                return whole
            return split(shape, length, *found, self.gap) or whole
        if parameter not in PARAMETERS:
            return whole
        if len(shape) > 2 and shape[1] != 1:
            self._tell(name)  # perhaps all experts in one tensor; a convolution has 1 there
            return whole
        dimension, inner = PARAMETERS[parameter]
        if self.conv1d and parameter == "weight" and cut is not Cut.VOCABULARY:
            dimension, inner = inner, dimension
        if cut is Cut.INPUT:
            if parameter in ("scales", "qzeros") and self.ordered:
                return whole  # act-order: every group may belong to every rank
            dimension = inner

        def divide(size: int) -> Ranges | None:
            if cut is Cut.INPUT:
                found = even(size, among, rank)
            else:
                found = self._of_output(name, module, cut, size, among, rank)
            if found is None:
                self._tell(name)
            return found

        if dimension is None or dimension >= len(shape):
            return whole
        ranges = self._scaled(module, parameter, dimension, shape[dimension], divide)
        if ranges is None:
            return whole
        return split(shape, length, dimension, ranges, self.gap) if ranges else []

    def _scaled(
        self,
        module: str,
        parameter: str,
        dimension: int,
        size: int,
        divide: Callable[[int], Ranges | None],
    ) -> Ranges | None:
        """Divide a dimension; that of block scales by the rows that the blocks stand for."""
        weight = self.shapes.get(f"{module}.weight")
        if parameter in SCALES and weight is not None and dimension < len(weight):
            rows = weight[dimension]
            if size == 1 and rows > 1:
                return None  # one scale for all
            if rows != size:
                ranges = divide(rows)
                block = self._block(dimension, rows, size)
                if ranges is None or block is None:
                    return None
                return [(begin // block, -(-end // block)) for begin, end in ranges]
        return divide(size)

    def _block(self, dimension: int, rows: int, blocks: int) -> int | None:
        """Return the rows that one scale stands for."""
        told = self.config.quantization.get("weight_block_size")
        if isinstance(told, list) and dimension < len(told):
            size = told[dimension]
            if type(size) is int and size > 0 and -(-rows // size) == blocks:
                return size
        if rows % blocks == 0:
            return rows // blocks
        for size in (128, 64, 32, 16, 256):
            if -(-rows // size) == blocks:
                return size
        return None

    def _of_output(
        self, name: str, module: str, cut: Cut, size: int, among: int, rank: int
    ) -> Ranges | None:
        """Divide the output dimension of a layer; None where that is not known to be right."""
        if cut is Cut.VOCABULARY:
            return vocabulary(size, among, rank)
        if cut is Cut.GATE_UP:
            return halves(size, among, rank)
        if cut in FUSED_ROWS:
            base = module.rpartition(".")[0]
            behind, decay = (self.shapes.get(f"{base}.{n}") for n in ("out_proj.weight", "A_log"))
            linear = cut is Cut.LINEAR_GROUPS
            groups = self.config.linear_heads if linear else self.config.groups
            return fused_rows(cut, size, behind, decay, groups, among, rank)
        heads, key_value = self.config.heads(name), self.config.key_value_heads(name)
        if cut is Cut.OUTPUT:
            return even(size, among, rank)
        if cut is Cut.KEY_VALUE:
            return self._key_value(name, module, size, key_value, among, rank)
        if key_value is None:
            return None
        if (rows := self._query_rows(module)) is not None and rows < size:
            # Queries have as many rows as the layer behind them has inputs.
            unit, rest = divmod(size - rows, 2 * key_value)
            heads = rows // unit if not rest and unit and rows % unit == 0 else heads
        if heads is None or size % (heads + 2 * key_value):
            return None
        found = concatenated(size, heads, key_value, among, rank)
        if cut is Cut.QKV_GROUPED:
            by_group = grouped(size, heads, key_value, among, rank)
            if not self.kinds or self.kinds & GROUPED:
                return by_group
            return None if found is None or by_group is None else joined([*found, *by_group])
        if self.conv1d and found is not None and (share := even(size, among, rank)) is not None:
            # vLLM takes queries, keys and values apart; an even share of the columns is what
            # Megatron's definition of the layer gives.  The rows are short: both are read.
            found = joined([*found, *share])
        return found

    def _key_value(
        self, name: str, module: str, size: int, heads: int | None, among: int, rank: int
    ) -> Ranges | None:
        """Divide a layer of keys or values by its heads."""
        told = self.config.head_size(name)
        if told and size % told == 0 and heads is not None and size // told != heads:
            queries = self.shapes.get(f"{sibling(module)}.weight")
            if queries is not None and queries[0] % told == 0:
                heads = size // told  # of this layer, whatever the others have
        if heads is None:
            # Vision and audio towers have as many heads of keys as of queries.
            return even(size, among, rank) if not self.config.is_text(name) else None
        return by_heads(size, heads, among, rank)

    def _query_rows(self, module: str) -> int | None:
        """Return the rows of the queries in a fused layer, from the layer behind it."""
        base = module.rpartition(".")[0]
        for output in _OUTPUTS:
            shape = self.shapes.get(f"{base}.{output}.weight")
            if shape is not None and len(shape) == 2:
                return shape[0] if self.conv1d else shape[1]
        return None

    # Tensors that hold all experts.

    def _of_experts(
        self, name: str, cut: Cut, shape: Shape, among: int, rank: int
    ) -> tuple[int, Ranges] | None:
        """Return the dimension by which all experts in one tensor are cut, and the rank's share."""
        if cut is Cut.EXPERTS_STACKED:
            experts = self.experts
            if not experts or len(shape) != 2 or shape[0] % experts:
                return None
            rows = shape[0] // experts
            share = even(rows, among, rank)
            if share is None:
                return None
            (begin, end), *_ = share
            return 0, [(at * rows + begin, at * rows + end) for at in range(experts)]
        matched = EXPERTS.fullmatch(name)
        suffix = (matched["suffix"] or "") if matched else ""
        if suffix == "bias":
            if cut is Cut.EXPERTS_DOWN or len(shape) != 2:
                return None
            share = self._gate_up(name, shape[1], among, rank)
            return None if share is None else (1, share)
        if len(shape) < 3:
            return None
        packed = suffix in ("blocks", "scales")
        transposed = False if packed else self._transposed(name, shape)
        if transposed is None:
            return None
        if cut is Cut.EXPERTS_GATE_UP:
            dimension = 2 if transposed else 1
            share = self._gate_up(name, shape[dimension], among, rank)
        else:
            dimension = 1 if transposed else 2
            share = even(shape[dimension], among, rank)
            if share is None and packed:  # gpt-oss: whole blocks, the last rank has fewer
                share = rounded_up(shape[dimension], among, rank)
        return None if share is None else (dimension, share)

    def _gate_up(self, name: str, size: int, among: int, rank: int) -> Ranges | None:
        """Divide gate and up of all experts: two halves, or in turns as gpt-oss has them."""
        blocks = self.shapes.get(f"{experts_base(name)}down_proj_blocks")
        if blocks is not None and len(blocks) == 4 and size == 2 * _MXFP4_BLOCK * blocks[2]:
            ranges = rounded_up(blocks[2], among, rank)
            return [(begin * 2 * _MXFP4_BLOCK, end * 2 * _MXFP4_BLOCK) for begin, end in ranges]
        if self.interleaved or blocks is not None:
            return even(size, among, rank)
        return halves(size, among, rank)

    def _transposed(self, name: str, shape: Shape) -> bool | None:
        """Tell whether the input dimension comes before the output's; None if shapes do not tell.

        (experts, 2 x inner, hidden) with (experts, hidden, inner), or both turned.
        """
        base = experts_base(name)
        both = [
            self.shapes.get(f"{base}{first}") or self.shapes.get(f"{base}{second}")
            for first, second in (
                ("gate_up_proj", "w13_weight"),
                ("down_proj", "w2_weight"),
            )
        ]
        if "_linear" in name:
            both = [
                self.shapes.get(f"{base}input_linear.weight"),
                self.shapes.get(f"{base}output_linear.weight"),
            ]
        gate_up, down = both
        if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
            return None
        straight = gate_up[1] == 2 * down[2] and gate_up[2] == down[1]
        turned = gate_up[2] == 2 * down[1] and gate_up[1] == down[2]
        return None if straight == turned else turned

    def _experts_here(
        self, name: str, shape: Shape, length: int, ep_rank: int, tp_rank: int
    ) -> list[Piece]:
        """Return what an expert-parallel rank reads of a tensor that holds all experts."""
        count = self.experts
        if not shape or not count or shape[0] % count or length % count:
            return [Piece(0, length, length)]
        size = length // count
        inner = self._cut(name, shape, length)[tp_rank]
        here = sorted(self._placed[ep_rank])
        if inner == [Piece(0, length, length)]:
            return [
                Piece(begin * size, (end - begin) * size, (end - begin) * size)
                for begin, end in joined((number, number + 1) for number in here)
            ]
        found = []
        for number in here:
            for piece in inner:
                rows = piece.rows // count
                if piece.rows % count:
                    return [Piece(0, length, length)]
                found.append(
                    Piece(
                        piece.offset + number * size,
                        piece.length,
                        piece.wanted // count,
                        rows,
                        piece.stride if rows > 1 else 0,
                    )
                )
        return found


_UNCUT = (None, Cut.WHOLE, Cut.REORDERED)
_ALL_EXPERTS = frozenset((Cut.EXPERTS_GATE_UP, Cut.EXPERTS_DOWN, Cut.EXPERTS_STACKED))
_BY_HEADS = frozenset((Cut.KEY_VALUE, Cut.QKV, Cut.QKV_GROUPED))
_BY_SHAPE = frozenset((Cut.OUTPUT, Cut.INPUT, Cut.VOCABULARY, Cut.GATE_UP))
#: The layer behind the queries, keys and values, as architectures call it.
_OUTPUTS = ("o_proj", "dense", "out_proj", "wo", "c_proj")
