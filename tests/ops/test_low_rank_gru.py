"""low_rank_gru on the CPU against torch.nn.GRU at full rank. Every cell: test_low_rank_cells.py."""

import pytest
import torch
from torch import nn

from str_triton import low_rank_gru
from tests.ops.low_rank_cases import full_rank, relative_error


@pytest.mark.parametrize("split", ["identity", "orthogonal"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_torchs_gru_at_full_rank(dtype, tolerance, bias, split):
    steps, batch, hidden = 30, 7, 48
    layer = nn.GRU(5, hidden, bias=bias).to(dtype)
    x, h0 = torch.randn(steps, batch, 5, dtype=dtype), torch.randn(1, batch, hidden, dtype=dtype)
    grads = torch.randn(steps, batch, hidden, dtype=dtype), torch.randn(1, batch, hidden, dtype=dtype)
    leaves = [x.requires_grad_(), h0.requires_grad_(), *layer.parameters()]
    outputs, h = layer(x, h0)
    want = (outputs, h, *torch.autograd.grad((outputs, h), leaves, grads))

    gates_x = nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0 if bias else None)
    u, m, v = full_rank(layer.weight_hh_l0, split)
    outputs, h = low_rank_gru(gates_x, u, m, v, layer.bias_hh_l0 if bias else None, h0[0])
    got = (outputs, h[None], *torch.autograd.grad((outputs, h[None]), leaves, grads))
    assert max(relative_error(*pair) for pair in zip(got, want, strict=True)) <= tolerance
