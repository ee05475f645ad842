"""Targets of ranks: the cost of a model with factored matrices at the end of training, a class for each kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from str_triton.budget.rank_budget import factored_matrices, other_costs
from str_triton.budget.target_kinds import Kinds, described, require_at_least_1
from str_triton.nn import LowRankWeight


@dataclass(frozen=True)
class RankCosts:
    """The cost of a model with factored matrices; all but `full` hold for dense and compact models alike.

    Attributes:
        full: cost of the controlled matrices with all components.
        least: cost of the controlled matrices with one component each.
        uncontrolled: cost of the other factored matrices that the target counts.
        dense_matrices: elements of all factored matrices that the target counts, as dense ones.
        others: parameters outside factored matrices.
        other_recurrent: the recurrent ones among `others`.
    """

    full: int
    least: int
    uncontrolled: int
    dense_matrices: int
    others: int
    other_recurrent: int


class RankTarget(metaclass=Kinds):
    """The highest cost at the end of a model with matrices in factors; give exactly one keyword.

    Args:
        total_rank: sum of the ranks of all `LowRankWeight`s, at least 1.
        params: parameters of the whole compact model, as in `RankBudget.params`, at least 1.
        recurrent_flops: multiply-adds per time step of the recurrent matrices (`RankBudget.recurrent_flops`), >= 1.
        compression: at least so many times fewer parameters than the dense model has, at least 1.

    Raises:
        ValueError: not exactly one keyword, or a value out of range.
    """

    example: ClassVar[str] = "RankTarget(compression=4)"
    keyword: ClassVar[str]
    recurrent_only: ClassVar[bool] = False

    def __init__(
        self,
        *,
        total_rank: float | None = None,
        params: float | None = None,
        recurrent_flops: float | None = None,
        compression: float | None = None,
    ) -> None: ...  # Only type checkers and editors read this signature: a call makes an instance of a subclass.

    def __repr__(self) -> str:
        return described(self, "RankTarget")

    def __post_init__(self) -> None:
        require_at_least_1(self)

    def cost(self, matrix: LowRankWeight, rank: int) -> int:
        """Return what a matrix costs at this rank."""
        return matrix.compact_cost(rank)

    def fixed(self, costs: RankCosts) -> int:
        """Return the cost, in the target's unit, of everything but the controlled matrices; here in parameters."""
        return costs.uncontrolled + costs.others

    def keep(self, costs: RankCosts) -> int:
        """Return the budget of the controlled matrices at the end.

        Raises ValueError if the target is above the cost of all components or below the cost of one per matrix.
        """
        fixed = self.fixed(costs)
        least, largest = fixed + costs.least, fixed + costs.full
        value = getattr(self, self.keyword)
        # No more than the first that is too large: infinity has no floor.
        return self._within(math.floor(min(value, largest + 1)), least, largest, f"{least} to {largest}") - fixed

    def _within(self, final: int, least: int, largest: int, bounds: str) -> int:
        if not least <= final <= largest:
            problem = "above the maximum" if final > largest else "below one component per matrix"
            value = getattr(self, self.keyword)
            raise ValueError(f"rank target {problem}: {self.keyword}={value}, possible are {bounds}")
        return final


@dataclass(frozen=True, repr=False)
class TotalRankTarget(RankTarget):
    """A sum of ranks."""

    keyword: ClassVar[str] = "total_rank"
    total_rank: int

    def cost(self, matrix: LowRankWeight, rank: int) -> int:
        return rank

    def fixed(self, costs: RankCosts) -> int:
        return costs.uncontrolled


@dataclass(frozen=True, repr=False)
class ParamsTarget(RankTarget):
    """A number of parameters of the whole compact model."""

    keyword: ClassVar[str] = "params"
    params: int


@dataclass(frozen=True, repr=False)
class RecurrentFlopsTarget(RankTarget):
    """Multiply-adds of the recurrent matrices per time step."""

    keyword: ClassVar[str] = "recurrent_flops"
    recurrent_only: ClassVar[bool] = True
    recurrent_flops: int

    def fixed(self, costs: RankCosts) -> int:
        return costs.uncontrolled + costs.other_recurrent


@dataclass(frozen=True, repr=False)
class CompressionTarget(RankTarget):
    """Parameters of the dense model over those of this one."""

    keyword: ClassVar[str] = "compression"
    compression: float

    def keep(self, costs: RankCosts) -> int:
        fixed = self.fixed(costs)
        least, largest = fixed + costs.least, fixed + costs.full
        dense = costs.others + costs.dense_matrices
        final = math.floor(dense / self.compression * (1 + 1e-12))  # so that a RankBudget's own compression can be met
        bounds = f"{math.ceil(dense / largest * 1e4) / 1e4} to {math.floor(dense / least * 1e4) / 1e4}"
        return self._within(final, least, largest, bounds) - fixed


def rank_costs(model: nn.Module, target: RankTarget, controlled: Sequence[LowRankWeight]) -> RankCosts:
    """Return what a model costs in the target's unit; `controlled`: the matrices whose ranks may fall."""
    counted = [m for m in factored_matrices(model).values() if m.recurrent or not target.recurrent_only]
    known = set(map(id, controlled))
    others, other_recurrent = other_costs(model)
    return RankCosts(
        full=sum(target.cost(m, m.max_rank) for m in controlled),
        least=sum(target.cost(m, 1) for m in controlled),
        uncontrolled=sum(target.cost(m, m.max_rank) for m in counted if id(m) not in known),
        dense_matrices=sum(m.rows * m.columns for m in counted),
        others=others,
        other_recurrent=other_recurrent,
    )
