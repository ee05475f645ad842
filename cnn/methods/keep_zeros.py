"""Fine-tuning of a pruned network whose zeros stay zero."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from str_triton.cnn.methods.masks import Masked


class KeepZeros(Masked):
    """A method that sets the weights that are zero now to zero after each step. The other weights stay trainable."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weights, keep=[weight.numel() for weight in weights.values()])
        self.masks = [weight.detach() != 0 for weight in self.weights]
        self._count()

    def _count(self) -> None:
        self.kept = sum(int(mask.sum()) for mask in self.masks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._count()

    def scheduled(self) -> dict[str, float]:
        return {"sparsity": 1 - self.kept / sum(self.keep)}

    def step(self, progress: float) -> None:
        self.apply()
        super().step(progress)
