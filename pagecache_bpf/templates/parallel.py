# SPDX-License-Identifier: Apache-2.0
"""Which layers and which experts a rank has: pipeline and expert parallelism.

Ranks are counted as vLLM and SGLang do: stages of the pipeline one after the other, in a stage the
ranks of tensor or expert parallelism, whichever are more.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagecache_bpf.errors import UsageError

MAX_RANKS = 1024


@dataclass(frozen=True)
class Parallel:
    """How a model is spread over ranks.

    tp: tensor-parallel ranks of a layer.  ep: expert-parallel ranks; 1: experts are cut as other
    layers are.  pp: stages of the pipeline; pp_layers: layers of each of them, () for vLLM's own
    shares.  redundant: experts that exist twice, as load balancing places them behind the others.
    Raises UsageError when that is impossible.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    pp_layers: tuple[int, ...] = ()
    redundant: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.tp, self.ep, self.pp) < 1 or self.world > MAX_RANKS:
            raise UsageError(
                f"{self.world:,} ranks are not possible", f"1 to {MAX_RANKS:,} are", "Use fewer"
            )
        if max(self.tp, self.ep) % min(self.tp, self.ep):
            raise UsageError(
                f"--tp {self.tp} and --ep {self.ep} do not go together",
                "one of them has to be a multiple of the other",
                "Give the ranks of tensor parallelism, and those that share the experts",
            )
        if self.pp_layers and len(self.pp_layers) != self.pp:
            raise UsageError(
                f"{len(self.pp_layers)} numbers of layers were given for {self.pp} stages",
                "",
                "Give one for each stage",
            )

    @property
    def stage_ranks(self) -> int:
        """Ranks of one stage of the pipeline."""
        return max(self.tp, self.ep)

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * max(self.tp, self.ep)

    @property
    def expert_tp(self) -> int:
        """Ranks among which one expert is cut."""
        return self.tp // self.ep if self.ep < self.tp else 1

    def rank(self, number: int) -> Rank:
        """Return where a rank is in all three.  Raises UsageError when there is no such rank."""
        if not 0 <= number < self.world:
            raise UsageError(
                f"there is no rank {number}", f"of {self.world} ranks the last is {self.world - 1}"
            )
        stage, local = divmod(number, self.stage_ranks)
        if self.ep < self.tp:
            return Rank(stage, local, local // self.expert_tp, local % self.expert_tp)
        return Rank(stage, local % self.tp, local, 0)

    def experts_of(self, rank: int, experts: int) -> frozenset[int]:
        """Return the experts that an expert-parallel rank has: even shares in their order.

        Source: vLLM, fused_moe/layer.py, determine_expert_map() (placement "linear"): the first
        ranks have one more where they do not divide.
        """
        physical = [*range(experts), *(number for number in self.redundant if number < experts)]
        share, more = divmod(len(physical), self.ep)
        begin = rank * share + min(rank, more)
        return frozenset(physical[begin : begin + share + (rank < more)])

    def stages_of(self, layers: int) -> list[range]:
        """Return the layers of each stage.

        Source: vLLM, distributed/utils.py, get_pp_indices(): what does not divide goes to the
        stages before the last one, from behind.
        """
        if self.pp_layers:
            shares = list(self.pp_layers)
            if sum(shares) != layers:
                raise UsageError(
                    f"the stages have {sum(shares)} layers",
                    f"the model has {layers}",
                    "Give numbers that add up to it",
                )
        else:
            shares = [layers // self.pp] * self.pp
            for number in range(2, layers % self.pp + 2):
                shares[-number] += 1
        begins = [sum(shares[:stage]) for stage in range(self.pp)]
        return [range(begin, begin + share) for begin, share in zip(begins, shares, strict=True)]


@dataclass(frozen=True)
class Rank:
    """A rank's number in the pipeline, in tensor parallelism, and among those of the experts."""

    stage: int
    tp: int
    ep: int
    expert_tp: int
