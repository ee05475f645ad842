"""What a model shall cost at the end, and how it gets there."""

from dataclasses import dataclass

SCHEDULES = {
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "linear": lambda t: t,
    "constant": lambda t: 1.0,
}


@dataclass(frozen=True)
class Target:
    """What the model shall cost at the end; exactly one of three.

    Attributes:
        sparsity: share of the counted weights that are zero, 0 to 1 (1 excluded).
        nonzeros: number of counted weights that are not zero, >= 1.
        flops: multiply-adds of a forward pass of the controller's example_input, >= 1.
    """

    sparsity: float | None = None
    nonzeros: int | None = None
    flops: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of sparsity, nonzeros, flops; got {given or 'none'}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"target sparsity must be in [0, 1), got {self.sparsity}")
        for name in ("nonzeros", "flops"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"target {name} must be at least 1, got {value}")
