"""The interface of low-rank layers for budgets and deployment, and the linear layer."""

from collections.abc import Mapping
from typing import Protocol, Self, Unpack, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton.nn.control import warn_if_unfinished
from str_triton.nn.low_rank import FactorOptions, LowRankWeight


class LinearOptions(FactorOptions, total=False):
    """The options of `LowRankWeight` by keyword."""

    device: torch.device | str | None
    dtype: torch.dtype | None


@runtime_checkable
class LowRankLayer(Protocol):
    """The interface for budgets and deployment of a layer that holds matrices in factors."""

    def factors(self) -> dict[str, LowRankWeight]:
        """Return the factored matrices by their name in the layer; one that is dense is not among them."""

    def ranks(self) -> dict[str, int]:
        """Return the rank of each of `factors()`."""

    def compact(self) -> nn.Module:
        """Return the layer of the surviving components, without thresholds; dense where that is not larger."""


class LowRankLinear(nn.Module):
    """nn.Linear whose weight is a `LowRankWeight`: [..., in_features] -> [..., out_features].

    Args:
        in_features, out_features, bias: as in nn.Linear.
        max_rank, options: those of `LowRankWeight`.
        ranks: the compact form instead, without a threshold: {"weight": rank}, or {} for a dense weight. The state dict
            of `compact()` fits a layer made with `ranks=compact.ranks()`.

    Attributes:
        weight: the LowRankWeight [out_features, in_features]; after `compact` a Parameter where dense is not larger.
        bias: Parameter [out_features] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        max_rank: int | None = None,
        ranks: Mapping[str, int] | None = None,
        **options: Unpack[LinearOptions],
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if ranks is not None:
            if unknown := [name for name in ranks if name != "weight"]:
                raise ValueError(f"ranks may name weight; got {', '.join(unknown)}")
            max_rank, options["thresholded"] = ranks.get("weight"), False
        weight = LowRankWeight(out_features, in_features, max_rank, **options)
        is_dense = ranks is not None and max_rank is None
        self.weight: LowRankWeight | nn.Parameter = nn.Parameter(weight.weight().detach()) if is_dense else weight
        self.bias = None
        if bias:
            bound = in_features**-0.5
            self.bias = nn.Parameter(weight.u.new_empty(out_features).uniform_(-bound, bound))

    @classmethod
    def from_dense(cls, dense: nn.Linear, *, max_rank: int | None = None, **options: Unpack[FactorOptions]) -> Self:
        """Return the layer with a dense layer's singular components, all of them unless max_rank says fewer; copies."""
        weight = LowRankWeight.from_dense(dense.weight, max_rank, **options)
        bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().clone())
        return cls._of(weight, bias).train(dense.training)

    @classmethod
    def _of(cls, weight: LowRankWeight | nn.Parameter, bias: nn.Parameter | None) -> Self:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.weight, layer.bias = weight, bias
        return layer

    def factors(self) -> dict[str, LowRankWeight]:
        """Return {"weight": the matrix}, or {} where it is dense."""
        return {"weight": self.weight} if isinstance(self.weight, LowRankWeight) else {}

    def ranks(self) -> dict[str, int]:
        """Return {"weight": its rank}, or {} where it is dense."""
        return {name: factor.rank for name, factor in self.factors().items()}

    def to_dense(self) -> nn.Linear:
        """Return a new nn.Linear that computes the same."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self._dense_weight())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def compact(self) -> "LowRankLinear":
        """Return a new layer of the surviving components, without a threshold; dense where that is not larger.

        Warns:
            UserWarning: the model does not meet its controller's target.
        """
        warn_if_unfinished(self)
        weight = self.weight.compact() if isinstance(self.weight, LowRankWeight) else None
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        dense = nn.Parameter(self._dense_weight()) if weight is None else weight
        return self._of(dense, bias).train(self.training)

    def _dense_weight(self) -> Tensor:
        return (self.weight.weight() if isinstance(self.weight, LowRankWeight) else self.weight).detach().clone()

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.weight, LowRankWeight):
            return self.weight(input, self.bias)
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
