"""Batch norm's running statistics, recomputed for the present weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def refresh_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Recompute the running means and variances of all batch norms in place, as averages over `batches`.

    In training the running statistics lag some ten steps behind the weights. While thresholds move, or the learning
    rate is high, an evaluation then measures the lag more than the network. Training itself does not read the running
    statistics, so a call during training, best inside `controller.exact()`, changes no step.

    Batch norms work as in training, all other layers as in evaluation (no dropout). Weights, modes and the batch norms'
    counts of batches stay as they are. Each of several processes refreshes its own copy.

    Args:
        model: any module, on the device of the batches.
        batches: inputs of the model: tensors, tuples or lists that begin with the input, or dictionaries of keyword
            arguments. Twenty batches of the training set, of the training's size, are enough (docs/exact-budgets.md).

    Raises:
        ValueError: `batches` is empty. After this and any other error the statistics are unchanged.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [[getattr(norm, name).clone() for name in _STATISTICS] for norm in norms]
    refreshed = False
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training = True
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        seen = False
        for batch in batches:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(batch if isinstance(batch, Tensor) else batch[0])
            seen = True
        refreshed = seen
    finally:
        for norm, momentum, statistics in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            for name, value in zip(_STATISTICS, statistics, strict=True):
                if name == "num_batches_tracked" or not refreshed:
                    getattr(norm, name).copy_(value)
        for module, training in modes:
            module.training = training
    if not refreshed:
        raise ValueError("batches is empty: give some batches of the training set")
