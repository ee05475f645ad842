"""Fine-tuning of an already pruned network, whose zeros stay as they are."""

from collections.abc import Mapping

from torch import nn

from cnn.methods.masks import Masked


class KeepZeros(Masked):
    """Sets what is zero now to zero after each step. A survivor that passes through zero trains on."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weights, keep=[weight.numel() for weight in weights.values()])
        self.masks = [weight.detach() != 0 for weight in self.weights]

    def step(self, progress: float) -> None:
        self.apply()
        super().step(progress)
