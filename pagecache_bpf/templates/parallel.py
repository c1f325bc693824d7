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

    Attributes:
        tp: tensor-parallel ranks of a layer.
        ep: expert-parallel ranks; 1: experts are cut as other layers are.
        pp: stages of the pipeline.
        pp_layers: layers of each stage; (): vLLM's own shares.
        redundant: numbers of experts that exist twice, as load balancing places them behind the
            others.

    Raises:
        UsageError: there is no such combination, or it has too many ranks.
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
        """All ranks: those of one stage, times the stages."""
        return self.pp * max(self.tp, self.ep)

    @property
    def expert_tp(self) -> int:
        """Ranks among which one expert is cut."""
        return self.tp // self.ep if self.ep < self.tp else 1

    def rank(self, number: int) -> Rank:
        """Tell where a rank is: in the pipeline, in tensor and in expert parallelism.

        Args:
            number: the rank, counted from 0.

        Returns:
            Its place in each of them.

        Raises:
            UsageError: there is no such rank.
        """
        if not 0 <= number < self.world:
            raise UsageError(
                f"there is no rank {number}", f"of {self.world} ranks the last is {self.world - 1}"
            )
        stage, local = divmod(number, self.stage_ranks)
        if self.ep < self.tp:
            return Rank(stage, local, local // self.expert_tp, local % self.expert_tp)
        return Rank(stage, local % self.tp, local, 0)

    def experts_of(self, rank: int, experts: int) -> frozenset[int]:
        """Tell which experts an expert-parallel rank has: even shares in their order.

        The first ranks have one more where the experts do not divide.

        Args:
            rank: the rank among those of the experts.
            experts: experts of a layer.

        Returns:
            Numbers of experts.

        Source: vLLM, fused_moe/layer.py, determine_expert_map() (placement "linear").
        """
        physical = [*range(experts), *(number for number in self.redundant if number < experts)]
        share, more = divmod(len(physical), self.ep)
        begin = rank * share + min(rank, more)
        return frozenset(physical[begin : begin + share + (rank < more)])

    def stages_of(self, layers: int) -> list[range]:
        """Tell which layers each stage of the pipeline has.

        What does not divide goes to the stages before the last one, from behind.

        Args:
            layers: layers of the model.

        Returns:
            The range of layers of each stage.

        Raises:
            UsageError: pp_layers does not add up to that.

        Source: vLLM, distributed/utils.py, get_pp_indices().
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
    """Where a rank is in each kind of parallelism.

    Attributes:
        stage: its stage of the pipeline.
        tp: its rank in tensor parallelism.
        ep: its rank among those that share the experts.
        expert_tp: its rank among those that cut one expert.
    """

    stage: int
    tp: int
    ep: int
    expert_tp: int
