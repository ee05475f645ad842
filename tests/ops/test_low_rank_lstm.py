"""low_rank_lstm on the CPU against torch.nn.LSTM at full rank. Every cell: test_low_rank_cells.py."""

import pytest
import torch
from torch import nn

from str_triton import low_rank_lstm
from tests.ops.low_rank_cases import full_rank, relative_error


@pytest.mark.parametrize("split", ["identity", "orthogonal"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_torchs_lstm_at_full_rank(dtype, tolerance, bias, split):
    steps, batch, hidden = 30, 7, 48
    layer = nn.LSTM(5, hidden, bias=bias).to(dtype)
    x, h0, c0 = (torch.randn(shape, dtype=dtype) for shape in ((steps, batch, 5), *[(1, batch, hidden)] * 2))
    grads = [torch.randn(shape, dtype=dtype) for shape in ((steps, batch, hidden), *[(1, batch, hidden)] * 2)]
    leaves = [tensor.requires_grad_() for tensor in (x, h0, c0)] + list(layer.parameters())
    outputs, (h, c) = layer(x, (h0, c0))
    want = (outputs, h, c, *torch.autograd.grad((outputs, h, c), leaves, grads))

    gates_x = nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0 if bias else None)
    u, m, v = full_rank(layer.weight_hh_l0, split)
    outputs, (h, c) = low_rank_lstm(gates_x, u, m, v, layer.bias_hh_l0 if bias else None, h0[0], c0[0])
    got = (outputs, h[None], c[None], *torch.autograd.grad((outputs, h[None], c[None]), leaves, grads))
    assert max(relative_error(*pair) for pair in zip(got, want, strict=True)) <= tolerance
