"""The threshold functions alpha = g(raw), their derivatives and inverses, by name (STR paper, section 3).

g and its derivative are computed in float64 and rounded once to raw's dtype. A float32 threshold then has the same bits
on the CPU, on a GPU and in compiled code, whose float32 exponentials differ in the last bit; the rare exception is a
value that float64 itself cannot tell from the middle between two float32 numbers (about one in 2^29).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ThresholdFunction(NamedTuple):
    """g, its derivative (both in raw's dtype), and its inverse on (0, inf); -inf or inf for values g never takes."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _rounded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a function: compute it in float64 and round the result to the argument's dtype."""
    return lambda raw: function(raw.double()).to(raw.dtype)


def _logit(alpha: Tensor) -> Tensor:
    return torch.special.logit(alpha.clamp(max=1))


# torch.sigmoid and torch.logaddexp round differently where a vector register ends: an element's bits would depend on
# its place. These formulas are finite, and right at 0, under autograd too.
def _sigmoid(raw: Tensor) -> Tensor:
    e = torch.exp(torch.where(raw < 0, raw, -raw))
    return torch.where(raw < 0, e, 1.0) / (1 + e)


def _sigmoid_derivative(raw: Tensor) -> Tensor:
    alpha = _sigmoid(raw)
    return alpha * (1 - alpha)


def _softplus(raw: Tensor) -> Tensor:
    return raw.clamp(min=0) + torch.log1p(torch.exp(torch.where(raw < 0, raw, -raw)))


def _inverse_softplus(alpha: Tensor) -> Tensor:
    return alpha + torch.log(-torch.expm1(-alpha))


THRESHOLD_FUNCTIONS: dict[str, ThresholdFunction] = {
    "sigmoid": ThresholdFunction(_rounded(_sigmoid), _rounded(_sigmoid_derivative), _logit),
    "exp": ThresholdFunction(_rounded(torch.exp), _rounded(torch.exp), torch.log),
    "softplus": ThresholdFunction(_rounded(_softplus), _rounded(_sigmoid), _inverse_softplus),
    # The threshold itself; the derivative at 0 is the one from the right, so that a threshold of 0 can grow.
    "identity": ThresholdFunction(lambda raw: raw.clamp(min=0), lambda raw: (raw >= 0).to(raw.dtype), lambda a: a),
}


def threshold_function(g: str) -> ThresholdFunction:
    """Return the functions behind the name `g`; a ValueError lists the names if `g` is unknown."""
    if g not in THRESHOLD_FUNCTIONS:
        raise ValueError(f"g must be one of {', '.join(map(repr, THRESHOLD_FUNCTIONS))}, got {g!r}")
    return THRESHOLD_FUNCTIONS[g]
