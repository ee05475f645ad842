"""The comparison of a compiled network with its model: rounding is no difference, everything else is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse.agree import agree
from tests.deploy.sparse_networks import prune


@pytest.mark.parametrize(
    ("found", "wanted", "truth", "equal"),
    [
        (1.0 + 5e-5, 1.0, None, True),
        (1.0 + 5e-4, 1.0, None, False),
        (1.0 + 5e-4, 1.0, 1.0 + 1e-4, True),  # the model is as far from the truth
        (1.0 + 5e-3, 1.0, 1.0 + 1e-4, False),
        (1.0 + 5e-3, 1.0, 1.1, False),  # float64 takes another way: no reference
        (3e-6, -3e-6, 1e-14, True),  # zero, but for rounding
        (9e-5, 3e-6, 1e-14, False),
        (3e-6, float("nan"), 1e-14, False),
        (float("inf"), float("inf"), float("inf"), True),
    ],
)
def test_rounding_is_no_difference(found: float, wanted: float, truth: float | None, equal: bool) -> None:
    exact = None if truth is None else torch.tensor([truth], dtype=torch.float64)
    assert agree(torch.tensor([found]), torch.tensor([wanted]), lambda: exact) is equal


class MeansOfNormalised(nn.Module):
    """A network whose first result is zero but for rounding, and whose second is the number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.norm(self.conv(x)).mean((2, 3)), self.calls * 1.0


def test_a_model_whose_values_are_rounding_noise_is_compiled() -> None:
    model, x = MeansOfNormalised().eval(), torch.randn(2, 3, 12, 12)
    prune(model)  # so that the kernels run the convolution, with sums in another order
    fast = deploy.compile_sparse(model, x, tune=False)
    assert isinstance(fast, deploy.SparseModel), fast.notes
    for number in (1, 2):
        means, calls = fast(x)
        assert (calls, float(means.abs().max()) < 1e-3) == (number, True)


class ByWindows(nn.Module):
    """A network that changes the rows that windows of two cover; torch.export sets the odd last row to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.0
        y.unfold(2, 2, 2).mul_(1.5)
        return self.conv(y)


def test_a_graph_that_torch_exports_wrongly_is_not_used() -> None:
    model, x = ByWindows().eval(), torch.randn(2, 3, 7, 6)
    fast: Any = deploy.compile_sparse(model, x, tune=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(x[:1]), model(x[:1]))
