"""Targets: what a model costs at the end of training, one small class for each kind, and the schedules that lead there.

`Target(sparsity=0.9)` gives a `SparsityTarget`, and so on: the keyword chooses the class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from str_triton.nn import LowRankWeight

SCHEDULES = {
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "linear": lambda t: t,
    "constant": lambda t: 1.0,
}


class _Kinds(type):
    """A class whose call gives an instance of the subclass that the keyword names."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        if hasattr(cls, "keyword"):
            return super().__call__(*args, **given)
        subclasses: list[Any] = cls.__subclasses__()
        kinds = {kind.keyword: kind for kind in subclasses}
        if unknown := sorted(given.keys() - kinds.keys()):
            raise TypeError(f"{cls.__name__} has no kind {unknown[0]!r}; it has {', '.join(kinds)}")
        named = {name: value for name, value in given.items() if value is not None}
        if args or len(named) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}; got {named or args or 'none'}")
        ((keyword, value),) = named.items()
        for number in [value] if keyword != "layers" else value.values() if isinstance(value, Mapping) else []:
            if not isinstance(number, Real) or isinstance(number, bool):
                raise TypeError(f"target {keyword} must be a number, got {number!r}")
        return kinds[keyword](value)


def require_kind(target: object, kind: type["Target"] | type["RankTarget"]) -> None:
    """Raise TypeError for a target that a controller cannot meet: a number, or a target of the other controller."""
    if not isinstance(target, kind):
        example = "Target(sparsity=0.9)" if kind is Target else "RankTarget(compression=4)"
        raise TypeError(f"target must be a {kind.__name__}, such as {example}, got {target!r}")


def _described(target: "Target | RankTarget", base: str) -> str:
    return f"{base}({target.keyword}={getattr(target, target.keyword)!r})"


@dataclass(frozen=True)
class Costs:
    """The cost of a model's weights when none is zero.

    Attributes:
        thresholded: cost of the thresholded weights in the target's unit.
        others: number of covered weights without a threshold.
        flops: multiply-adds of the whole model; 0 where the target does not count them.
    """

    thresholded: int
    others: int
    flops: int


class Target(metaclass=_Kinds):
    """The model's cost at the end; give exactly one of five keywords.

    Args:
        sparsity: share of the counted weights that are zero, from 0 to below 1.
        nonzeros: number of counted weights that are not zero, at least 1.
        flops: multiply-adds of a forward pass of the controller's example_input, at least 1.
        flops_share: the same as a share of the dense model's multiply-adds, above 0 and at most 1.
        layers: share of each thresholded weight that is zero, 0 to 1, by the weight's name in `Budget.rows`.

    Raises:
        ValueError: not exactly one keyword, or a value out of range.
    """

    keyword: ClassVar[str]
    counts_flops: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        nonzeros: float | None = None,
        flops: float | None = None,
        flops_share: float | None = None,
        layers: Mapping[str, float] | None = None,
    ) -> None:
        """Show the keywords to type checkers and editors; the call makes an instance of a subclass instead."""

    def __repr__(self) -> str:
        return _described(self, "Target")

    def keep(self, costs: Costs) -> int:
        """Return what the thresholded weights may cost at the end."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class SparsityTarget(Target):
    """A share of zeros."""

    keyword: ClassVar[str] = "sparsity"
    sparsity: float

    def __post_init__(self) -> None:
        if 1 < self.sparsity < 100:
            raise ValueError(f"target sparsity is a share, got {self.sparsity}: did you mean {self.sparsity / 100:g}?")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"target sparsity must be in [0, 1), got {self.sparsity}")

    def keep(self, costs: Costs) -> int:
        total = costs.thresholded + costs.others
        return total - round(self.sparsity * total) - costs.others


@dataclass(frozen=True, repr=False)
class NonzerosTarget(Target):
    """A number of weights that are not zero."""

    keyword: ClassVar[str] = "nonzeros"
    nonzeros: int

    def __post_init__(self) -> None:
        _require_at_least_1(self, "a share of zeros is Target(sparsity=...)")

    def keep(self, costs: Costs) -> int:
        return math.floor(min(self.nonzeros, costs.thresholded + costs.others)) - costs.others


@dataclass(frozen=True, repr=False)
class FlopsTarget(Target):
    """A number of multiply-adds."""

    keyword: ClassVar[str] = "flops"
    counts_flops: ClassVar[bool] = True
    flops: int

    def __post_init__(self) -> None:
        _require_at_least_1(self, f"a share of the dense model's is Target(flops_share={self.flops})")

    def keep(self, costs: Costs) -> int:
        return math.floor(min(self.flops, costs.flops)) - (costs.flops - costs.thresholded)


@dataclass(frozen=True, repr=False)
class FlopsShareTarget(Target):
    """A share of the dense model's multiply-adds."""

    keyword: ClassVar[str] = "flops_share"
    counts_flops: ClassVar[bool] = True
    flops_share: float

    def __post_init__(self) -> None:
        if self.flops_share > 1:
            raise ValueError(
                f"target flops_share must be in (0, 1], got {self.flops_share}: a percentage is "
                f"{self.flops_share / 100:g}, a number of multiply-adds is Target(flops={self.flops_share})"
            )
        if not 0 < self.flops_share <= 1:
            raise ValueError(f"target flops_share must be in (0, 1], got {self.flops_share}")

    def keep(self, costs: Costs) -> int:
        return round(self.flops_share * costs.flops) - (costs.flops - costs.thresholded)


@dataclass(frozen=True, repr=False)
class LayersTarget(Target):
    """A share of zeros for each thresholded weight."""

    keyword: ClassVar[str] = "layers"
    by_layer: ClassVar[bool] = True
    layers: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"target layers must map names to shares of zeros, got {type(self.layers).__name__}")
        for name, sparsity in self.layers.items():
            if not 0 <= sparsity <= 1:
                raise ValueError(f"target sparsity of layer {name!r} must be in [0, 1], got {sparsity}")


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


class RankTarget(metaclass=_Kinds):
    """The highest cost at the end of a model with matrices in factors; give exactly one of four keywords.

    Args:
        total_rank: sum of the ranks of all `LowRankWeight`s, at least 1.
        params: parameters of the whole compact model, as in `RankBudget.params`, at least 1.
        recurrent_flops: multiply-adds per time step of the recurrent matrices (`RankBudget.recurrent_flops`), >= 1.
        compression: at least so many times fewer parameters than the dense model has, at least 1.

    Raises:
        ValueError: not exactly one keyword, or a value out of range.
    """

    keyword: ClassVar[str]
    recurrent_only: ClassVar[bool] = False

    def __init__(
        self,
        *,
        total_rank: float | None = None,
        params: float | None = None,
        recurrent_flops: float | None = None,
        compression: float | None = None,
    ) -> None:
        """Show the keywords to type checkers and editors; the call makes an instance of a subclass instead."""

    def __repr__(self) -> str:
        return _described(self, "RankTarget")

    def __post_init__(self) -> None:
        _require_at_least_1(self)

    def cost(self, matrix: LowRankWeight, rank: int) -> int:
        """Return what a matrix costs at this rank."""
        return matrix.compact_cost(rank)

    def fixed(self, costs: RankCosts) -> int:
        """Return the cost, in the target's unit, of everything but the controlled matrices."""
        raise NotImplementedError

    def keep(self, costs: RankCosts) -> int:
        """Return what the controlled matrices may cost at the end.

        Raises ValueError where the target is above the cost of all components or below that of one per matrix.
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

    def fixed(self, costs: RankCosts) -> int:
        return costs.uncontrolled + costs.others


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

    def fixed(self, costs: RankCosts) -> int:
        return costs.uncontrolled + costs.others

    def keep(self, costs: RankCosts) -> int:
        fixed = self.fixed(costs)
        least, largest = fixed + costs.least, fixed + costs.full
        dense = costs.others + costs.dense_matrices
        final = math.floor(
            dense / self.compression * (1 + 1e-12)
        )  # RankBudget.compression gives back its own parameters.
        bounds = f"{math.ceil(dense / largest * 1e4) / 1e4} to {math.floor(dense / least * 1e4) / 1e4}"
        return self._within(final, least, largest, bounds) - fixed


def _require_at_least_1(target: Target | RankTarget, hint: str = "") -> None:
    value = getattr(target, target.keyword)
    if not value >= 1:
        hint = f"; {hint}" if hint else ""
        raise ValueError(f"target {target.keyword} must be at least 1, got {value}{hint}")
