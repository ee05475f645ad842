"""The threshold functions alpha = g(raw), their derivatives and inverses, by name (STR paper, section 3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ThresholdFunction(NamedTuple):
    """g, its derivative, and its inverse on (0, inf); values that g never takes map to -inf or inf."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _logit(alpha: Tensor) -> Tensor:
    return torch.special.logit(alpha.clamp(max=1))


def _sigmoid_derivative(raw: Tensor) -> Tensor:
    alpha = raw.sigmoid()
    return alpha * (1 - alpha)


def _softplus(raw: Tensor) -> Tensor:
    return torch.logaddexp(raw, torch.zeros_like(raw))


def _inverse_softplus(alpha: Tensor) -> Tensor:
    return alpha + torch.log(-torch.expm1(-alpha))


THRESHOLD_FUNCTIONS: dict[str, ThresholdFunction] = {
    "sigmoid": ThresholdFunction(torch.sigmoid, _sigmoid_derivative, _logit),
    "exp": ThresholdFunction(torch.exp, torch.exp, torch.log),
    "softplus": ThresholdFunction(_softplus, torch.sigmoid, _inverse_softplus),
    # The threshold itself; the derivative at 0 is the one from the right, so that a threshold of 0 can grow.
    "identity": ThresholdFunction(lambda raw: raw.clamp(min=0), lambda raw: (raw >= 0).to(raw.dtype), lambda a: a),
}


def threshold_function(g: str) -> ThresholdFunction:
    """The functions behind the name `g`; ValueError lists the names when it is unknown."""
    if g not in THRESHOLD_FUNCTIONS:
        raise ValueError(f"g must be one of {', '.join(map(repr, THRESHOLD_FUNCTIONS))}, got {g!r}")
    return THRESHOLD_FUNCTIONS[g]
