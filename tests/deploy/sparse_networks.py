"""Networks with random zeros, and what it means that a compiled one is the same."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prune(model: nn.Module, density: float = 0.2) -> nn.Module:
    """Random zeros, norms with statistics, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Conv1d):
            module.weight.data *= torch.rand_like(module.weight) < density
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.1, 2)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
    return model.eval()


def same(model: nn.Module, compiled: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double()).float()
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(compiled(x.clone()), want, rtol=1e-4, atol=1e-4 * max(1.0, largest))


class Two(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor | None], linear: bool = False) -> None:
        super().__init__()
        layers = [nn.Linear(16, 16), nn.Linear(16, 16)] if linear else [nn.Conv2d(16, 16, 3, padding=1) for _ in "ab"]
        self.first, self.last = layers
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.between(y)
        return self.last(y if z is None else z)


class Excite(nn.Module):
    def __init__(self, *mean: object) -> None:
        super().__init__()
        self.mean = mean
        self.first, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.first(x))
        z = y * torch.sigmoid(self.up(torch.relu(self.down(y.mean(*self.mean)))))
        return y + self.last(z)
