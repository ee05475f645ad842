"""compile_sparse: activations become part of the layers before them, where that changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse.graph.nodes import ACTIVATIONS, Linear
from str_triton.deploy.sparse.records import node_of, node_record
from tests.deploy.sparse_networks import prune, same

pytestmark = pytest.mark.usefixtures("kernels", "by_kernels")


class Two(nn.Module):
    """A convolution or a linear layer before an activation, and one after it."""

    def __init__(self, function: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.function(self.layers[0](x)))


def compiled(function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, nn.Module, Tensor]:
    model = prune(Two(function, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)), 0.5)
    x = torch.randn(2, 3, 9, 11)
    network = deploy.compile_sparse(model, x)
    same(model, network, x)
    return model, network, x


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fused_and_saved(name: str, tmp_path: Path):
    model, network, x = compiled(ACTIVATIONS[name])
    assert [layer.activation for layer in network.graph.layers()] == [name, ""]
    assert len(network.graph.nodes) == 3
    network.save(tmp_path / "network.sparse")
    same(model, deploy.load_sparse(tmp_path / "network.sparse"), x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_arguments_of_every_size(name: str):
    first = nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0]]))
        first.bias.zero_()
    model = Two(ACTIVATIONS[name], first, nn.Identity())
    ends = torch.linspace(80, 95, 50_000)  # where e^x leaves the range of float32
    sizes = torch.logspace(-38, 37, 2_000)
    x = torch.cat([torch.linspace(-200, 200, 50_000), ends, -ends, sizes, -sizes])
    x = torch.stack([x, torch.zeros_like(x)], 1)
    network = deploy.compile_sparse(model, x)
    assert [layer.activation for layer in network.graph.layers()] == [name]
    torch.testing.assert_close(network(x), model(x), rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 20), (3, 5, 20)])
def test_linear_layers(shape: tuple[int, ...]):
    model = prune(Two(F.gelu, nn.Linear(20, 30), nn.Linear(30, 7)), 0.5)
    x = torch.randn(shape)
    network = deploy.compile_sparse(model, x)
    same(model, network, x)
    assert [layer.activation for layer in network.graph.layers()] == ["gelu", ""]


def test_clamps_before_are_fused_and_after_are_not():
    _, network, _ = compiled(lambda x: F.silu(x.clamp(-1.0, 0.5)))
    assert network.graph.layers()[0].activation == "silu"
    _, network, _ = compiled(lambda x: F.silu(x).clamp(-0.1, 0.5))
    assert network.graph.layers()[0].clamp == (-float("inf"), float("inf"))


def test_of_two_activations_the_first_is_fused():
    _, network, _ = compiled(lambda x: F.gelu(torch.sigmoid(x)))
    assert network.graph.layers()[0].activation == "sigmoid"


def test_a_layer_with_other_readers_keeps_its_value():
    _, network, _ = compiled(lambda x: x * torch.sigmoid(x) + 0 * x)
    assert network.graph.layers()[0].activation == ""


def test_a_pool_of_negative_values():
    """silu gives negative values, and the padding of a max pool is not zero."""
    model = prune(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1)), 0.5
    )
    model[0].bias.data.fill_(-1.0)
    model[0].weight.data.mul_(0.01)
    x = torch.randn(1, 3, 9, 11)
    same(model, deploy.compile_sparse(model, x), x)


@pytest.mark.parametrize("name", ["", "gelu", "tan", 3, None, ["gelu"]])
def test_a_file_names_an_activation_that_is_known(name: object):
    layer = Linear("y", ["x"], torch.ones(2, 3), torch.zeros(2))
    tensors: dict[str, Tensor] = {}
    record = node_record(layer, tensors) | {"activation": name}
    if name in ("", "gelu"):
        assert node_of(record, tensors, {"x"}).activation == name
    else:
        with pytest.raises(ValueError, match="y is no linear layer"):
            node_of(record, tensors, {"x"})


@pytest.mark.parametrize("limit", [1e39, 10**400, float("nan")])
def test_a_file_names_limits_that_are_float32(limit: float):
    tensors: dict[str, Tensor] = {}
    record = node_record(Linear("y", ["x"], torch.ones(2, 3), torch.zeros(2)), tensors)
    with pytest.raises((ValueError, OverflowError)):
        node_of(record | {"clamp": {"tuple": [0.0, limit]}}, tensors, {"x"})
