"""The common part of the methods with masks: plain layers whose weights hold the zeros, and exact counts."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Masked:
    """A controller for `Loop` that keeps some elements of each weight and sets the others to zero.

    Masks change only at steps, so the model always holds the schedule's current value and `exact()` does nothing. Each
    process computes the same masks, since weights and averaged gradients are the same.

    Args:
        weights: the Parameters, by the names of their layers.
        keep: the number of elements of each weight that are not zero at the end.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], keep: Sequence[int]) -> None:
        self.weights, self.keep = list(weights.values()), list(keep)
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights]
        self.progress, self.steps = 0.0, 0

    def attach(self, optimizer: Optimizer) -> None:
        """Register hooks on the optimizer's steps. Call this once, before the first step."""

    def step(self, progress: float) -> None:
        """Update the masks after `optimizer.step()`. ``progress`` is the share of training that is done, 0 to 1."""
        self.progress = progress
        self.steps += 1

    def exact(self) -> AbstractContextManager:
        """Return a context that does nothing: the schedule's value holds at any time."""
        return nullcontext()

    def scheduled(self) -> dict[str, float]:
        """Return the present share of zeros for a progress line. Looks at no weight."""
        return {"sparsity": 1 - sum(self.keep) / sum(weight.numel() for weight in self.weights)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming."""
        masks = [mask.clone() for mask in self.masks]
        return {"progress": self.progress, "steps": self.steps, "keep": self.keep, "masks": masks}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`. Raise ValueError if it belongs to another target or model."""
        if state["keep"] != self.keep:
            raise ValueError("the state belongs to another target by layer; has the file of --budget changed?")
        self.progress, self.steps = state["progress"], state["steps"]
        for mask, value in zip(self.masks, state["masks"], strict=True):
            mask.copy_(value)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the elements outside the masks to zero."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.masked_fill_(~mask, 0.0)  # a product would give -0.0, whose sign a packed file must store


def largest(scores: Tensor, number: int) -> Tensor:
    """Return a mask of exactly ``number`` elements, the largest of ``scores``; among equal ones the first.

    Does not synchronize with the device.
    """
    if not 0 < number < scores.numel():
        return torch.full_like(scores, number > 0, dtype=torch.bool)
    flat = scores.flatten()
    if flat.is_cpu:
        cut = flat.kthvalue(flat.numel() - number + 1).values  # on the CPU several times as fast as topk
    else:
        cut = flat.topk(number, sorted=False).values.amin()
    above, equal = flat > cut, flat == cut
    chosen = above | (equal & (equal.cumsum(0) <= number - above.sum()))
    return chosen.view(scores.shape)
