"""Targets of sparsity: the cost of a model at the end of training, a class for each kind, and the schedules.

`Target(sparsity=0.9)` gives a `SparsityTarget`, and so on: the keyword chooses the class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from str_triton.budget.target_kinds import Kinds, described, require_at_least_1

SCHEDULES = {
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "linear": lambda t: t,
    "constant": lambda t: 1.0,
}


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


class Target(metaclass=Kinds):
    """The model's cost at the end; give exactly one keyword.

    Args:
        sparsity: share of the counted weights that are zero, from 0 to below 1.
        nonzeros: number of counted weights that are not zero, at least 1.
        flops: multiply-adds of a forward pass of the controller's example_input, at least 1.
        flops_share: the same as a share of the dense model's multiply-adds, above 0 and at most 1.
        layers: share of each thresholded weight that is zero, 0 to 1, by the weight's name in `Budget.rows`.

    Raises:
        ValueError: not exactly one keyword, or a value out of range.
    """

    example: ClassVar[str] = "Target(sparsity=0.9)"
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
    ) -> None: ...  # Only type checkers and editors read this signature: a call makes an instance of a subclass.

    def __repr__(self) -> str:
        return described(self, "Target")

    def keep(self, costs: Costs) -> int:
        """Return the budget of the thresholded weights at the end."""
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
        require_at_least_1(self, "a share of zeros is Target(sparsity=...)")

    def keep(self, costs: Costs) -> int:
        return math.floor(min(self.nonzeros, costs.thresholded + costs.others)) - costs.others


@dataclass(frozen=True, repr=False)
class FlopsTarget(Target):
    """A number of multiply-adds."""

    keyword: ClassVar[str] = "flops"
    counts_flops: ClassVar[bool] = True
    flops: int

    def __post_init__(self) -> None:
        require_at_least_1(self, f"a share of the dense model's is Target(flops_share={self.flops})")

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
