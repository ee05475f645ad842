"""compile_sparse on forwards that ask for strides, keep values in attributes, or take any number of arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from str_triton import deploy
from str_triton.deploy.sparse.fallback import ModulewiseModel
from tests.deploy.sparse_networks import prune
from tests.messages import holding

pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


class Forward(nn.Module):
    """One layer, and a forward that is given as a function of the module and its argument."""

    def __init__(self, forward: Callable[..., Any], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer, self.last = forward, layer, None
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor, scale: Any = None) -> Any:
        return self.function(self, x) if scale is None else self.function(self, x) * scale


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ask", [Tensor.is_contiguous, is_channels_last, lambda x: x.stride(0) > x.stride(1)])
@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 4, 1), lambda: nn.Linear(5, 4)])
def test_a_branch_on_strides(
    by_kernels, tmp_path: Path, ask: Callable[[Tensor], bool], layer: Callable[[], nn.Module]
) -> None:
    """torch.export takes the branch of the example without a condition."""
    model = prune(Forward(lambda self, x: self.layer(x) if ask(x) else self.layer(-x), layer()), 0.5)
    x = torch.randn(2, 3, 4, 5)
    turned = x.transpose(0, 3).contiguous().transpose(0, 3)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    compiled = deploy.compile_sparse(model, x)
    compiled.save(tmp_path / "net")
    with torch.no_grad():
        for given in (x, turned, channels_last):
            torch.testing.assert_close(compiled(given), model(given))
            if given is not x:
                with pytest.raises(ValueError, match=r"for contiguous tensors, got strides \[.*\] of the input$"):
                    deploy.load_sparse(tmp_path / "net")(given)
        compiled = deploy.compile_sparse(model, channels_last)
        for given in (x, turned, channels_last):
            torch.testing.assert_close(compiled(given), model(given))


def with_the_last(self: Forward, x: Tensor) -> Tensor:
    y = self.layer(x) if self.last is None else self.layer(x) + self.last.mean()
    self.last = y
    return y


def with_a_count(self: Forward, x: Tensor) -> Tensor:
    y = self.layer(x) + self.count
    self.count.data.add_(1)
    return y


@pytest.mark.parametrize("forward", [with_the_last, with_a_count])
def test_what_an_export_would_lose_between_calls(by_kernels, forward: Callable[..., Tensor]) -> None:
    """A retrace of the second model, in which torch.export finds no values, would end the process."""
    model, x = prune(Forward(forward, nn.Linear(4, 4)), 0.5), torch.randn(3, 4)
    compiled = deploy.compile_sparse(model, x)
    assert isinstance(compiled, ModulewiseModel)
    with torch.no_grad():
        for given in (x, x, torch.randn(2, 4)):
            torch.testing.assert_close(compiled(given), model(given))


def test_complex_results(by_kernels) -> None:
    model, x = prune(Forward(lambda self, x: torch.fft.fft(self.layer(x)), nn.Linear(4, 4)), 0.5), torch.randn(3, 4)
    compiled = deploy.compile_sparse(model, x)
    assert isinstance(compiled, deploy.SparseModel)
    torch.testing.assert_close(compiled(x), model(x).detach())


class Sum(Forward):
    def forward(self, *args: Tensor, more: Tensor) -> Tensor:
        return self.layer(sum(args) + more)


def test_any_number_of_arguments_of_open_sizes(by_kernels, tmp_path: Path) -> None:
    model = prune(Sum(len, nn.Linear(4, 4)), 0.5)
    deploy.compile_sparse(model, (torch.randn(3, 4),) * 2, {"more": torch.randn(3, 4)}).save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")
    for batch in (0, 1, 3, 5):
        a, b, more = torch.randn(3, batch, 4)
        torch.testing.assert_close(loaded(a, b, more=more), model(a, b, more=more).detach())
    with pytest.raises(ValueError, match=r"\(_, _, more=_\).* got \(_, _, _, more=_\)$"):
        loaded(a, b, a, more=more)


def test_another_constant_is_refused_in_one_line(by_kernels, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = Forward(lambda self, x: self.layer(x), nn.Linear(4, 4)).eval()
    deploy.compile_sparse(model, (x, None)).save(tmp_path / "net")
    with pytest.raises(ValueError, match=r"for None .*argument 2.* got a Tensor$"):
        deploy.load_sparse(tmp_path / "net")(x, torch.randn(20, 4))


def test_a_layer_without_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=holding("0.weight .. Sequential")):
        deploy.compile_sparse(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))


def test_sizes_that_the_model_refuses_are_tried_silently(by_kernels, capfd: pytest.CaptureFixture[str]) -> None:
    """torch.fx prints a traceback for every call of a graph module that fails in a function."""
    model = Forward(lambda self, x: F.linear(x, self.layer.weight), nn.Linear(8, 3))
    deploy.compile_sparse(fx.symbolic_trace(model, {"scale": None}).eval(), torch.randn(2, 8))
    assert capfd.readouterr() == ("", "")


class Doubles(nn.Module):
    """It changes an argument before it reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y.mul_(2)
        return self.layer(x)


def test_arguments_that_share_memory_and_are_changed(by_kernels) -> None:
    x, other = torch.randn(2, 2, 4)
    compiled = deploy.compile_sparse(Doubles().eval(), (x, other))
    before = x.clone()
    with pytest.raises(ValueError, match=holding("arguments .. share memory")):
        compiled(x, x)
    assert torch.equal(x, before)
    assert compiled(x[:0], x[:0]).shape == (0, 3)


class Chooses(Doubles):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.layer, lambda x: self.layer(-x), (x,))


def test_a_network_with_a_branch_can_be_stored(by_kernels, tmp_path: Path) -> None:
    model, x = Chooses().eval(), torch.randn(2, 4)
    compiled = deploy.compile_sparse(model, x)
    assert isinstance(compiled, deploy.SparseModel)
    torch.save(compiled, tmp_path / "net")
    loaded = torch.load(tmp_path / "net", weights_only=False)
    for given in (x, -x):
        torch.testing.assert_close(loaded(given), model(given).detach())


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: not x.is_inference() and x._version,
        lambda x: x.storage_offset(),
        lambda x: x._is_view(),
        lambda x: x.is_inference(),
        lambda x: x.untyped_storage().nbytes() > 4 * x.numel(),
    ],
    ids=["_version", "storage_offset", "_is_view", "is_inference", "untyped_storage"],
)
def test_a_forward_may_read_how_a_tensor_was_made(by_kernels, reads: Callable[[Tensor], object]):
    model = prune(Forward(lambda self, x: self.layer(x) * (2.0 if reads(x) else 1.0), nn.Linear(6, 4)), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(3, 6))
    view = torch.empty(2, 3, 6)[1].copy_(torch.randn(3, 6))
    with torch.inference_mode():
        inference = torch.randn(3, 6)
    for x in (torch.randn(3, 6), view, inference):
        with torch.no_grad():
            wanted = model(x)
        torch.testing.assert_close(compiled(x).detach(), wanted, rtol=1e-4, atol=1e-4)


READS = {
    "requires_grad": lambda x: x.requires_grad,
    "is_leaf": lambda x: not x.is_leaf,
    "grad_fn": lambda x: x.grad_fn is not None,
    "grad": lambda x: x.is_leaf and x.grad is not None,
    "class": lambda x: isinstance(x, nn.Parameter),
}


@pytest.mark.parametrize("read", READS)
def test_a_forward_may_read_what_gradients_need(by_kernels, tmp_path: Path, read: str):
    reads = READS[read]
    model = prune(Forward(lambda self, x: self.layer(x) * (2.0 if reads(x) else 1.0), nn.Linear(6, 4)), 0.5)
    plain, leaf = torch.randn(3, 6), nn.Parameter(torch.randn(3, 6))
    leaf.grad = torch.zeros_like(leaf)
    compiled = deploy.compile_sparse(model, plain)
    assert isinstance(compiled, deploy.SparseModel)
    for x in (plain, leaf, leaf * 1):
        with torch.no_grad():
            wanted = model(x)
        torch.testing.assert_close(compiled(x).detach(), wanted, rtol=1e-4, atol=1e-4)
    compiled.save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")
    with pytest.raises(ValueError, match="without gradients, and the input requires them"):
        loaded(leaf)
