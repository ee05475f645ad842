"""Recurrent layers whose recurrent matrix is int8. States and inputs stay float32.

The loop in C multiplies with 16-bit codes of the states (native/codes.h), whose rounding is small beside that of the
weights. `run` computes in float32.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.quantized import LARGEST, SMALLEST
from str_triton.deploy.sparse.graph.recurrent import Recurrent


@dataclass
class QuantizedRecurrent(Recurrent):
    """One direction of a recurrent layer with an int8 `weight`, and int8 `v` if there is one.

    The matrix is diag(steps) weight v^T, or diag(steps) weight.

    Attributes:
        steps: [gates * hidden] float32, the scales of the rows of `weight`.
    """

    steps: Tensor = field(kw_only=True)

    dtypes: ClassVar = (torch.int8, torch.float32)

    def is_whole(self) -> bool:
        if not super().is_whole() or not isinstance(self.steps, Tensor) or self.steps.dtype != torch.float32:
            return False
        codes = [self.weight] if self.v is None else [self.weight, self.v]
        # The sums of the kernels count on it.
        symmetric = all(int(code.min()) >= -LARGEST for code in codes)
        # Products with states of at most one must not overflow: the kernels and torch add them in other orders.
        largest = float(self.steps.abs().max()) * LARGEST ** len(codes) * self.weight.shape[1] * self.hidden
        return symmetric and self.steps.shape == self.weight.shape[:1] and largest < torch.finfo(torch.float32).max

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.decoded().run(values)

    def decoded(self) -> Recurrent:
        """Return the layer with the float32 weights that the int8 ones stand for."""
        kept = {name.name: getattr(self, name.name) for name in fields(Recurrent)}
        kept["weight"] = self.weight.float() * self.steps[:, None]
        kept["v"] = None if self.v is None else self.v.float()
        return Recurrent(**kept)


def quantized_recurrent(node: Recurrent) -> QuantizedRecurrent:
    """Return a recurrent layer with int8 weights.

    Each row of the matrix, or of its left factor, and each column of the right factor have one scale, without an
    offset. The left factor takes the scales of the right one before it is quantized.
    """
    kept = {name.name: getattr(node, name.name) for name in fields(Recurrent)}
    weight = node.weight.double()
    if node.v is not None:
        kept["v"], scale = _codes(node.v.t().double())
        kept["v"] = kept["v"].t().contiguous()
        weight = weight * scale
    kept["weight"], steps = _codes(weight)
    return QuantizedRecurrent(**kept, steps=steps.float())


def _codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 codes of the rows of a float64 matrix, and their scales."""
    scale = (rows.abs().amax(1) / LARGEST).float().double()
    scale = torch.where(scale < SMALLEST, torch.ones_like(scale), scale)
    return torch.round(rows / scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.int8), scale
