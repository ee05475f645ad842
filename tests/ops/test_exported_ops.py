"""The registered ops as torch.export keeps them: alone, without the autograd Functions of the public functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from str_triton import (
    LowRankFastGRNN,
    LowRankGRU,
    LowRankLSTM,
    singular_value_threshold,
    soft_threshold,
    soft_threshold_many,
)


class Weight(nn.Module):
    """A linear layer whose weight a function makes."""

    def __init__(self, make) -> None:
        super().__init__()
        self.weight, self.raw = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.tensor(-1.0))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.make(self.weight, self.raw).t()


MODELS = {
    "gru": (lambda: LowRankGRU(4, 6, num_layers=2, max_rank=3), (5, 2, 4)),
    "lstm": (lambda: LowRankLSTM(4, 6, bidirectional=True), (5, 2, 4)),
    "fastgrnn": (lambda: LowRankFastGRNN(4, 6), (5, 2, 4)),
    "soft threshold": (lambda: Weight(soft_threshold), (3, 5)),
    "many": (lambda: Weight(lambda w, raw: soft_threshold_many([w, w.t()], [raw, raw])[1].t()), (3, 5)),
    "singular values": (lambda: Weight(singular_value_threshold), (3, 5)),
}


def straight(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args, gradient="straight_through")


STRICT = {
    "straight through": (lambda: Weight(lambda w, raw: straight(soft_threshold, w, raw)), (3, 5)),
    "many straight through": (lambda: Weight(lambda w, raw: straight(soft_threshold_many, [w], [raw])[0]), (3, 5)),
    **{name: MODELS[name] for name in ("fastgrnn", "soft threshold", "many", "singular values")},
    "a fixed threshold": (lambda: Weight(lambda w, raw: soft_threshold(w, raw, learn_threshold=False)), (3, 5)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_trains(name: str, gradients: bool):
    compare_training(*MODELS[name], gradients, strict=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRICT)
def test_strict_export_keeps_every_gradient(name: str):
    compare_training(*STRICT[name], gradients=True, strict=True)


def compare_training(make: Callable[[], nn.Module], shape: tuple[int, ...], gradients: bool, strict: bool) -> None:
    model, x = make(), torch.randn(shape)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (x,), strict=strict).module()
    results = []
    for module in (model, program):
        y = torch.utils._pytree.tree_leaves(module(x))[0]
        parameters = dict(sorted(module.named_parameters()))
        grads = torch.autograd.grad(y.square().sum(), list(parameters.values()), allow_unused=True)
        results.append([y, *(torch.zeros(()) if grad is None else grad for grad in grads)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(torch.utils._pytree.tree_leaves(program(x))[0], results[0][0].detach())
