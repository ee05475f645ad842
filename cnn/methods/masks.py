"""What the methods with masks share: plain layers whose weights hold the zeros themselves, and exact counts."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Masked:
    """Keeps some of each weight's elements and sets the others to zero; a controller for `Loop`.

    Masks change at steps, never in between: the model always holds what the schedule said last, and `exact()` has
    nothing to do. Each process computes the same masks, since weights and averaged gradients are the same.

    Args:
        weights: the Parameters, by the names of their layers.
        keep: for each of them how many elements are not zero at the end.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], keep: Sequence[int]) -> None:
        self.weights, self.keep = list(weights.values()), list(keep)
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights]
        self.progress, self.steps = 0.0, 0

    def attach(self, optimizer: Optimizer) -> None:
        """Take part in the steps of the optimizer that trains the weights; to be called once, before the first."""

    def step(self, progress: float) -> None:
        """Call after `optimizer.step()`, with the share of training that is done, 0 to 1."""
        self.progress = progress
        self.steps += 1

    def exact(self) -> AbstractContextManager:
        """Where the schedule's value holds exactly: everywhere."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What to go on with."""
        masks = [mask.clone() for mask in self.masks]
        return {"progress": self.progress, "steps": self.steps, "keep": self.keep, "masks": masks}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; ValueError if it was made for another target or model."""
        if state["keep"] != self.keep:
            raise ValueError("the state was made for another target by layers; has the file that names it changed?")
        self.progress, self.steps = state["progress"], state["steps"]
        for mask, value in zip(self.masks, state["masks"], strict=True):
            mask.copy_(value)

    @torch.no_grad()
    def apply(self) -> None:
        """Set what the masks leave out to zero."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.masked_fill_(~mask, 0.0)  # a product would leave -0.0, whose sign a packed file has to store


def largest(scores: Tensor, number: int) -> Tensor:
    """Where the ``number`` largest of ``scores`` are, exactly so many; of equal ones the first. Bool, of their shape.

    Nothing is fetched from the device.
    """
    if not 0 < number < scores.numel():
        return torch.full_like(scores, number > 0, dtype=torch.bool)
    flat = scores.flatten()
    if flat.is_cpu:
        cut = flat.kthvalue(flat.numel() - number + 1).values  # several times as fast as topk there
    else:
        cut = flat.topk(number, sorted=False).values.amin()
    above, equal = flat > cut, flat == cut
    chosen = above | (equal & (equal.cumsum(0) <= number - above.sum()))
    return chosen.view(scores.shape)
