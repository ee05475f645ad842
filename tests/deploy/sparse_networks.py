"""Networks with random zeros, and what it means that a compiled one is the same."""

import copy

import torch
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
