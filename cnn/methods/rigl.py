"""RigL (Evci et al., 2020): sparse from the start; at intervals zeros with large gradients replace small weights."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from str_triton.cnn.methods.masks import Masked, largest

FRACTION = 0.3  # share of the connections that the first update drops; a cosine decreases it to 0 at END
END = 0.75  # share of training after which the connections stay


class RigL(Masked):
    """A method that moves connections every ``interval`` steps. Each layer has ``keep`` of them, at first random ones.

    As in the paper, an update replaces a step of the optimizer. Each layer drops the int(fraction * keep) connections
    with the smallest magnitude. As many grow among those that are then missing, where the gradient is largest. A grown
    connection starts at zero and without momentum, so the model holds that many more zeros until the next step.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], keep: Sequence[int], *, interval: int) -> None:
        super().__init__(weights, keep)
        self.interval = interval
        for mask, number in zip(self.masks, self.keep, strict=True):
            mask.copy_(largest(torch.rand(mask.shape, device="cpu"), number))  # on the CPU: the same for any device
        self.apply()

    @property
    def fraction(self) -> float:
        """The share of the connections that an update would drop now, before rounding down."""
        return FRACTION / 2 * (1 + math.cos(math.pi * min(self.progress / END, 1)))

    def attach(self, optimizer: Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer))

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        if self.steps > 0 and self.steps % self.interval == 0 and self.progress < END:
            for weight, mask, keep in zip(self.weights, self.masks, self.keep, strict=True):
                if weight.grad is not None:
                    self._move(weight, mask, keep, optimizer)
            optimizer.zero_grad()  # without gradients the optimizer's step changes nothing
            return
        for weight, mask in zip(self.weights, self.masks, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def _move(self, weight: nn.Parameter, mask: Tensor, keep: int, optimizer: Optimizer) -> None:
        dropped = int(self.fraction * keep)
        kept = largest(weight.abs().where(mask, -1.0), keep - dropped)
        assert weight.grad is not None
        grown = largest(weight.grad.abs().masked_fill(kept, -1.0), dropped)
        new = grown & ~mask
        mask.copy_(kept | grown)
        weight.masked_fill_(~mask, 0.0)
        for memory in optimizer.state.get(weight, {}).values():
            if isinstance(memory, Tensor) and memory.shape == weight.shape:
                memory.mul_(mask & ~new)
