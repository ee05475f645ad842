"""Operations between convolutions: parallel branches, arithmetic on images, gates, concatenations, splits, pools."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Input
from str_triton.deploy.sparse.runtime.segment import Segment

pytestmark = pytest.mark.usefixtures("kernels")


class Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[Tensor, nn.Module], Tensor], layer: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.between, self.layer = between, layer
        self.first, self.last = nn.Conv2d(3, 8, 3, stride, 1), nn.LazyConv2d(4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x), self.layer))


def compiled(model: nn.Module, x: Tensor) -> deploy.SparseModel:
    """Return the network with every layer by the kernels, after a comparison with the model in four shapes."""
    model = model.eval()
    with torch.no_grad():
        model(x)
        for parameter in model.parameters():
            parameter *= torch.rand_like(parameter) < 0.5
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    network = deploy.compile_sparse(model, x, tune=False)
    for cut in ((4, 3, 2), (1, 1, 1)):
        network.choices = dict.fromkeys(network.choices, Choice("sparse", *cut))
        network._plans.clear()
        for shape in ((1, 3, 13, 18), (3, 3, 13, 18), (2, 3, 22, 9), (2, 3, 64, 80)):
            images = torch.randn(shape)
            with torch.no_grad():
                torch.testing.assert_close(network(images), model(images), rtol=1e-4, atol=1e-4)
    return network


def calls(network: deploy.SparseModel, x: Tensor) -> list[str]:
    """Return the operations that torch executes for such an input."""
    network(x)
    plan = network._plan([x])
    run = [node for node in plan.segments if not isinstance(node, Segment | Input)]
    return [str(node.target) if isinstance(node, Call) else type(node).__name__ for node in run]


BETWEEN: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "relu of a sum": lambda x, a: F.relu(x + F.silu(x)),
    "norm before its activation": lambda x, a: F.relu(a(F.silu(x))),
    "times a number": lambda x, a: F.gelu(x) * 0.7 + 1.5,
    "leaky relu": lambda x, a: F.leaky_relu(x, 0.2),
    "average": lambda x, a: F.avg_pool2d(x, 3, 2, 1),
    "average, rounded up": lambda x, a: F.avg_pool2d(x, 2, 1, ceil_mode=True, count_include_pad=False),
    "largest of negative numbers": lambda x, a: F.max_pool2d(x - 9.0, 3, 2, 1),
    "largest, rounded up": lambda x, a: F.max_pool2d(F.relu(x) * -1.0, 3, 2, ceil_mode=True),
    "concatenation": lambda x, a: torch.cat([F.relu(x), x, F.max_pool2d(x, 3, 1, 1)], 1),
    "halves": lambda x, a: torch.cat(x.chunk(2, 1)[::-1], 1),
    "slices": lambda x, a: x[:, 1:6] + x[:, -5:],
    "gate": lambda x, a: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_convolutions_runs_in_their_buffers(name: str):
    network = compiled(Between(BETWEEN[name], nn.BatchNorm2d(8)), torch.randn(2, 3, 13, 18))
    assert calls(network, torch.randn(1, 3, 13, 18)) in ([], ["aten.sigmoid.default"])


def test_averages_over_fewer_pixels_at_the_edge():
    between = Between(lambda x, a: F.avg_pool2d(x, 3, 2, 1, True, False), nn.Identity())
    assert calls(compiled(between, torch.randn(2, 3, 13, 18)), torch.randn(1, 3, 13, 18)) == ["AvgPool"]


def test_squeeze_and_excitation():
    layers = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid())
    network = compiled(Between(lambda x, a: a(x.mean((2, 3), keepdim=True)) * x, layers), torch.randn(2, 3, 13, 18))
    assert calls(network, torch.randn(1, 3, 13, 18)) == []


def test_a_gate_leaves_the_padding_zero():
    model = Between(lambda x, a: x * torch.full_like(x.mean((2, 3), keepdim=True), torch.inf), nn.Identity())
    x = torch.randn(1, 3, 9, 9)
    model(x)
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.fill_(1.0)
        model.last.weight.fill_(1.0)
    network = deploy.compile_sparse(model.eval(), x, tune=False)
    network.choices = dict.fromkeys(network.choices, Choice("sparse"))
    network._plans.clear()
    assert calls(network, x) == ["aten.full_like.default"]
    assert torch.equal(network(x), torch.full((1, 4, 9, 9), torch.inf))


class Branches(nn.Module):
    """A block of RepVGG or MobileOne: convolutions and a norm of one value."""

    def __init__(self, groups: int, stride: int, dilation: int) -> None:
        super().__init__()
        channels = 8
        self.before = nn.Conv2d(3, channels, 1)
        self.wide = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.small = nn.Conv2d(channels, channels, 1, stride, groups=groups)
        self.norm = nn.BatchNorm2d(channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(x))
        y = 0 + self.small(x)
        y += self.wide(x)
        return F.relu(y if self.norm is None else self.norm(x) + y)


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (8, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_parallel_branches_are_one_convolution(groups: int, stride: int, dilation: int):
    network = compiled(Branches(groups, stride, dilation), torch.randn(2, 3, 13, 18))
    assert [node.kernel for node in network.graph.layers() if isinstance(node, Convolution)] == [(1, 1), (3, 3)]


class Apart(nn.Module):
    """Branches that cannot be one: of two values, or where one is read elsewhere, or with an activation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=(2 if how == "places" else 1))

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "values":
                return self.a(x) + self.b(F.relu(x))
            case "read":
                y = self.a(x)
                return (y + self.b(x)) * y
            case "activation":
                return F.relu(self.a(x)) + self.b(x)
            case "places":
                return self.a(x) + self.b(x)[:, :, 1:-1, 1:-1]
        raise AssertionError(self.how)


@pytest.mark.parametrize("how", ["values", "read", "activation", "places"])
def test_branches_that_are_not_merged(how: str):
    network = compiled(Apart(how), torch.randn(2, 3, 13, 18))
    assert sum(type(node) is Convolution for node in network.graph.layers()) == 2


@pytest.mark.parametrize(
    ("size", "moved"),  # The planes of small images would be mostly padding, so those are copied.
    [
        ((40, 200), []),
        ((128, 128), ["conv2d_4"]),
        ((121, 139), ["conv2d_4"]),
        ((64, 64), ["conv2d_1", "conv2d_4"]),
    ],
)
def test_layers_before_a_strided_one_write_its_phases(size: tuple[int, int], moved: list[str]):
    layers = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16),
        nn.Conv2d(16, 16, 5, padding=(3, 2), dilation=(2, 1), groups=16),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    model, x = nn.Sequential(*layers), torch.randn(2, 3, *size)
    network = compiled(model, x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)
    copies = [task.value for task in network._plan([x]).tasks if task.kind == "copy"]
    assert copies == ["input", *moved, "max_pool2d"]


class Rows(nn.Module):
    """Several forms of a mean, and a linear layer that reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mean = self.conv(x).mean((2, 3), keepdim=True)
        rows = mean.flatten(1)
        return rows.view(-1, 2, 4), self.linear(rows.squeeze()).unsqueeze(1), mean


def test_reshapes_between_kernels_move_nothing():
    model, x = Rows().eval(), torch.randn(2, 3, 9, 9)
    network = deploy.compile_sparse(model, x, tune=False)
    network.choices = dict.fromkeys(network.choices, Choice("sparse"))
    network._plans.clear()
    assert calls(network, x) == []
    first, wanted = network(x), model(x)
    network(torch.randn(2, 3, 9, 9))  # It must not write into the results of the call before.
    for value, want in zip(first, wanted, strict=True):
        torch.testing.assert_close(value, want.detach(), rtol=1e-4, atol=1e-4)
    assert first[0].data_ptr() == first[2].data_ptr()  # as in torch
