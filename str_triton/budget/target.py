"""What a model shall cost at the end, and how it gets there."""

from collections.abc import Mapping
from dataclasses import dataclass

SCHEDULES = {
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "linear": lambda t: t,
    "constant": lambda t: 1.0,
}


@dataclass(frozen=True)
class Target:
    """What the model shall cost at the end; exactly one of four.

    Attributes:
        sparsity: share of the counted weights that are zero, 0 to 1 (1 excluded).
        nonzeros: number of counted weights that are not zero, >= 1.
        flops: multiply-adds of a forward pass of the controller's example_input, >= 1.
        layers: share of each thresholded layer's weights that are zero, 0 to 1, by the layer's name in `Budget.rows`.
    """

    sparsity: float | None = None
    nonzeros: int | None = None
    flops: int | None = None
    layers: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        _require_one_of(self)
        for name, sparsity in (self.layers or {}).items():
            if not 0 <= sparsity <= 1:
                raise ValueError(f"target sparsity of layer {name!r} must be in [0, 1], got {sparsity}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"target sparsity must be in [0, 1), got {self.sparsity}")
        _require_at_least_1(self, "nonzeros", "flops")


@dataclass(frozen=True)
class RankTarget:
    """What a model with matrices in factors shall cost at the end, at most; exactly one of four.

    Attributes:
        total_rank: sum of the ranks of all `LowRankWeight`s, >= 1.
        params: parameters of the whole compact model, as in `RankBudget.params`, >= 1.
        recurrent_flops: multiply-adds per time step of the recurrent matrices (`RankBudget.recurrent_flops`), >= 1.
        compression: at least so many times fewer parameters than the dense model has, >= 1.
    """

    total_rank: int | None = None
    params: int | None = None
    recurrent_flops: int | None = None
    compression: float | None = None

    def __post_init__(self) -> None:
        _require_one_of(self)
        _require_at_least_1(self, "total_rank", "params", "recurrent_flops", "compression")


def _require_one_of(target: Target | RankTarget) -> None:
    given = {name: value for name, value in vars(target).items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(vars(target))}; got {given or 'none'}")


def _require_at_least_1(target: Target | RankTarget, *names: str) -> None:
    for name in names:
        value = getattr(target, name)
        if value is not None and not value >= 1:
            raise ValueError(f"target {name} must be at least 1, got {value}")
