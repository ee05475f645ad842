"""The benchmark of what the kernels reach of the processor's limits."""

import pytest
import torch
from torch import nn

from benchmarks.speed.kernel_limits import layers, rates
from str_triton import deploy
from str_triton.native.build import library


@pytest.mark.skipif(library() is None, reason="needs a C compiler")
def test_layers_have_bounds_and_the_network_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 3, 2, 1))
    for parameter in model.parameters():
        parameter.data *= torch.rand_like(parameter) > 0.7
    x, rate = torch.randn(1, 3, 32, 32), rates()
    assert all(value > 1e8 for value in rate.values())
    network = deploy.compile_sparse(model.eval(), x, tune=False)
    before = network(x)
    rows = {row["layer"]: row for row in layers(network, x, rate, passes=2) if row["task"] == "window"}
    assert torch.equal(network(x), before)
    nonzeros = [int(model.get_submodule(name).weight.count_nonzero()) for name in ("0", "2", "3")]
    pixels = [(32 // stride) ** 2 for stride in (1, 1, 2)]
    for (name, row), weights, count in zip(rows.items(), nonzeros, pixels, strict=True):
        assert weights * count <= row["multiply_adds"] < 2 * weights * count, name
        assert row["read"] == 4 * row["multiply_adds"]
        assert all(row[bound] > 0 for bound in ("seconds", "near", "peak", "L1", "L2"))
