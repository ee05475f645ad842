"""DNW, discovering neural wirings (Wortsman et al., 2019): the largest weights are used, and all are trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from str_triton.cnn.methods.masks import Masked, largest


class DNW(Masked):
    """A method whose forward pass uses only the ``keep`` largest weights of each layer, while all weights are trained.

    The model holds the sparse weights, so autograd gives the gradients at the zeros as well. The dense weights replace
    them during the optimizer's step, weight decay included. The target holds from the first step to the last.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], keep: Sequence[int]) -> None:
        super().__init__(weights, keep)
        self.dense = [weight.detach().clone() for weight in self.weights]
        self._rewire()

    def attach(self, optimizer: Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda *_: self._restore())
        optimizer.register_step_post_hook(lambda *_: self._rewire(moved=True))

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, dense in zip(self.weights, self.dense, strict=True):
            weight.copy_(dense)

    @torch.no_grad()
    def _rewire(self, moved: bool = False) -> None:
        """Keep the largest dense weights and zero the others. With ``moved``, first take them from the model."""
        for weight, dense, mask, keep in zip(self.weights, self.dense, self.masks, self.keep, strict=True):
            if moved:
                dense.copy_(weight)
            mask.copy_(largest(dense.abs(), keep))
        self.apply()

    def state_dict(self) -> dict[str, Any]:
        dense: list[Tensor] = [weight.clone() for weight in self.dense]
        return super().state_dict() | {"dense": dense}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for dense, value in zip(self.dense, state["dense"], strict=True):
            dense.copy_(value)
