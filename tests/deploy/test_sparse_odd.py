"""compile_sparse on what stands between layers in the wild, on what cannot be traced, and on bare layers."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from str_triton import deploy
from str_triton.deploy.sparse.executions.choice import Choice
from tests.deploy.sparse_networks import prune, same
from tests.messages import holding

pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


class Odd(nn.Module):
    """Operations between other people's layers: in-place sums, gates, views, broadcast sums, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False)
        self.gate = nn.Conv2d(8, 8, 1)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.last = nn.Conv2d(16, 6, 3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.act = nn.Hardtanh(-0.5, 0.7)
        self.head = nn.Linear(6, 5)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        z = self.relu(y) + y  # y is what the in-place ReLU left.
        z = self.shared(self.shared(z)) + self.shift
        z += F.relu6(self.gate(z))
        gate = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(z, 1)))
        z = torch.cat([self.act(self.reflect(z * gate)), F.max_pool2d(z, 3, 1, 1)], 1)
        z = self.last(z)
        return self.head(z.mean([2, 3]) + z.mean((-2, -1), keepdim=True).view(z.size(0), -1))


@pytest.mark.parametrize("kernels_only", [True, False])
def test_whatever_stands_between_the_layers(request, tmp_path: Path, kernels_only: bool):
    if kernels_only:
        request.getfixturevalue("by_kernels")
    model, x = prune(Odd(), 0.4), torch.randn(2, 3, 13, 14)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    same(model, compiled, torch.randn(1, 3, 20, 9))
    assert compiled.left == {}
    compiled.save(tmp_path / "odd")
    assert torch.equal(deploy.load_sparse(tmp_path / "odd")(x), compiled(x))


class Context(nn.Module):
    """A sum in which the convolution's output is broadcast, and not the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.adaptive_avg_pool2d(x, 1))


def test_a_convolution_that_is_broadcast_in_a_sum(by_kernels):
    model = prune(Context(), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(2, 4, 1, 1))
    for size in ((1, 1), (7, 9)):
        same(model, compiled, torch.randn(2, 4, *size))


class Unexportable(nn.Module):
    """It branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.narrow = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum() > 1e9:
            y = -y
        return self.head(self.narrow(y.flatten(2)).mean(2))


def test_what_cannot_be_exported_is_compiled_layer_by_layer(tmp_path: Path):
    model, x = prune(Unexportable()), torch.randn(2, 3, 13, 14)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    same(model, compiled, torch.randn(1, 3, 9, 30))
    assert isinstance(model.conv, nn.Conv2d)
    lines = [line.split()[0] for line in str(compiled).splitlines()]
    assert lines == ["layer", "conv", "head", "narrow", "Unexportable"]
    assert "torch.export" in compiled.notes[0]
    with pytest.raises(ValueError, match="Unexportable could not be exported"):
        compiled.save(tmp_path / "x")
    same(model, copy.deepcopy(compiled), x)


class ThroughAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, :2].mul_(3.0)
        return self.last(y)


def test_what_is_changed_through_a_view(by_kernels):
    model, x = ThroughAView().eval(), torch.randn(1, 3, 9, 9)
    same(model, deploy.compile_sparse(model, x), x)


def test_hooks_stay(by_kernels):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(1, 3, 9, 9)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    assert compiled.left == {}


@pytest.mark.parametrize("index", [1, 2, 3])
def test_hooks_of_what_would_be_fused_stay(by_kernels, index: int):
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 1)
    model, x = prune(nn.Sequential(*layers), 0.8), torch.randn(1, 3, 9, 9)
    model[index].register_forward_hook(lambda module, args, output: output * 2)
    same(model, deploy.compile_sparse(model, x), x)


def test_hooks_of_the_whole_network_stay(by_kernels):
    model, x = prune(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.8), torch.randn(1, 3, 9, 9)
    model.register_forward_hook(lambda module, args, output: output * 2)
    same(model, deploy.compile_sparse(model, x), x)


class Misleading(nn.Module):
    """Forwards that a tracer without shapes and types of its own takes wrongly."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv = way, nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if self.way == "optional argument":
            return y if mask is None else mask
        if self.way == "type of a value":
            return y * 2 if isinstance(y, Tensor) else y
        view = y.flatten(1)
        y.relu_()
        return view * 1.5


@pytest.mark.parametrize("way", ["optional argument", "type of a value", "base of a view"])
def test_what_tracers_take_wrongly(by_kernels, way: str):
    model, x = prune(Misleading(way), 0.8), torch.randn(2, 3, 9, 9)
    same(model, deploy.compile_sparse(model, x), x)


class Tied(nn.Module):
    """Not exportable, and it reads a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16, bias=False)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        if y.sum() > 1e9:
            y = -y
        return F.linear(self.block(y), self.embed.weight.t())


def test_compiled_layers_keep_the_attributes_of_the_plain_ones():
    model, x = prune(Tied()), torch.randn(2, 5, 8)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    same(model, copy.deepcopy(compiled), x)


class Noisy(nn.Module):
    """It calls what files may not: random numbers, of which this one uses none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x).abs().masked_fill(x[:, :, 2:, 2:] > 0, 1.0) + 0 * torch.rand_like(x).sum()]


def test_what_a_file_cannot_hold_torch_saves(tmp_path: Path, by_kernels):
    model, x = prune(Noisy()), torch.randn(2, 3, 9, 9)
    compiled = deploy.compile_sparse(model, x)
    assert type(compiled(x)) is list
    with pytest.raises(ValueError, match=holding("rand_like .. torch.save")):
        compiled.save(tmp_path / "x")
    torch.save(compiled, tmp_path / "x")
    loaded = torch.load(tmp_path / "x", weights_only=False)
    assert torch.equal(loaded(x)[0], compiled(x)[0])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_through(by_kernels, wrap):
    model, x = prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), torch.randn(1, 3, 9, 9)
    compiled = deploy.compile_sparse(wrap(model), x)
    assert isinstance(compiled, deploy.SparseModel)
    same(model, compiled, x)


def test_masks_of_torch_prune():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 9, 9)
    torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    compiled = deploy.compile_sparse(model, x)
    torch.nn.utils.prune.remove(model[0], "weight")
    same(model.eval(), compiled, x)
    assert [int(node.weight.count_nonzero()) for node, _ in compiled.layers()] == [int(model[0].weight.count_nonzero())]


def test_bare_layers_and_pointwise_linear():
    for model, shape in (
        (nn.Conv2d(4, 6, 3), (1, 4, 8, 8)),
        (nn.Linear(6, 3), (2, 5, 6)),
        (nn.Conv2d(4, 6, 3), (4, 8, 8)),
    ):
        same(model.eval(), deploy.compile_sparse(model, torch.randn(shape)), torch.randn(shape))


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


def shrunk(x: Tensor) -> Tensor:
    part = x[:, :, 1:]
    x.untyped_storage().resize_(40)
    return part


WITHOUT_MEMORY = {
    "freed": freed,
    "shrunk": shrunk,
    "zeros that are not stored": lambda x: torch._efficientzerotensor(x.shape),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
}


@pytest.mark.parametrize("make", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY.keys())
def test_a_tensor_without_memory_is_refused(by_kernels, tmp_path: Path, make: Callable[[Tensor], Tensor]):
    """Kernels, and most of torch's operations, would read address 0 or memory of others."""
    model, x = prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1))), torch.randn(2, 3, 8, 8)
    compiled = deploy.compile_sparse(model, x)
    compiled.save(tmp_path / "net")
    compiled(x), compiled(x[:, :, 1:].clone())  # which have plans now
    for network in (
        compiled,
        deploy.load_sparse(tmp_path / "net"),
        lambda y: deploy.compile_sparse(model, y),
        torch.compile(model, backend="str_sparse"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="are not in memory"):
            network(make(x.clone()))


def test_weights_without_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    freed(model[1].weight.data)
    with pytest.raises(ValueError, match=holding("1.weight .. [2, 3]")):
        deploy.compile_sparse(model, torch.randn(1, 4))


def test_a_group_norm_is_as_accurate_in_channels_last() -> None:
    """torch's own is not: in channels_last it loses the variance of large values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)).eval()
    model[0].bias.data += 100
    x = torch.randn(2, 3, 14, 16).contiguous(memory_format=torch.channels_last)
    fast = deploy.compile_sparse(model, x, tune=False)
    fast.choices = dict.fromkeys(fast.choices, Choice("dense"))
    wanted = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(fast(x).double(), wanted, rtol=0, atol=3e-4)


class SharedHeads(nn.Module):
    """Attention whose queries share keys and values, [B, T, 8] -> [B, T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)


def test_queries_that_share_keys_and_values(by_kernels, tmp_path: Path) -> None:
    model = prune(SharedHeads().eval(), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(2, 5, 8))
    assert isinstance(compiled, deploy.SparseModel)
    compiled.save(tmp_path / "net")
    for network in (compiled, deploy.load_sparse(tmp_path / "net")):
        for batch, steps in ((2, 5), (1, 9), (0, 3)):
            same(model, network, torch.randn(batch, steps, 8))


@pytest.mark.parametrize("layer", [nn.RNN(6, 4), nn.LSTM(6, 4, proj_size=2)], ids=["rnn", "projected"])
def test_recurrent_layers_that_only_torch_has_are_saved_by_torch(by_kernels, tmp_path: Path, layer: nn.Module) -> None:
    compiled = deploy.compile_sparse(layer, torch.randn(5, 2, 6))
    torch.testing.assert_close(compiled(torch.ones(5, 2, 6))[0], layer(torch.ones(5, 2, 6))[0].detach())
    with pytest.raises(ValueError, match=r"which a file cannot hold: torch\.save"):
        compiled.save(tmp_path / "net")
