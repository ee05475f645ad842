"""Networks on 8-bit integers: the arithmetic of the reference, calibration, what stays in float32, files."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Graph
from str_triton.deploy.sparse.graph.quantized import (
    Dequantize,
    Grid,
    Quantize,
    QuantizedConvolution,
    QuantizedGate,
    QuantizedLinear,
    QuantizedMean,
)
from str_triton.deploy.sparse.quantize import faster
from str_triton.deploy.sparse.quantize.faster import select
from str_triton.deploy.sparse.quantize.quantize import _Calibration
from str_triton.deploy.sparse.quantize.ranges import METHODS, Range
from str_triton.deploy.sparse.stopwatch import Stopwatch
from tests.deploy.sparse_networks import prune

pytestmark = [
    pytest.mark.usefixtures("kernels", "quick"),
    pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:pack:UserWarning"),
]


class Mixed(nn.Module):
    """A stem, a residual, a concatenation with a pooled branch, a depthwise layer, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.deep = nn.Conv2d(16, 16, 3, 2, 1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.two(torch.relu(self.one(x))) + x)
        z = torch.cat([y, nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        return self.head(nn.functional.relu6(self.deep(z)).mean((2, 3)))


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return prune(Mixed(), 0.5)


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 19, 23) for _ in range(2)]


@pytest.fixture(scope="module")
def quantized(mixed, batches) -> deploy.QuantizedModel:
    return deploy.quantize(mixed, batches, labels=[mixed(x).argmax(1) for x in batches])


def test_a_layer_is_the_formula():
    """Sums of integers, one product in float32, the residual, the clamp, rounding to even: element by element."""
    torch.manual_seed(0)
    grids = (Grid(0.0625, 3), Grid(0.5, 100), Grid(0.25, 7))
    weight = torch.randint(-127, 128, (4, 2, 3, 2), dtype=torch.int8)
    bias, scale = torch.randint(-999, 999, (4,), dtype=torch.int32), torch.rand(4) / 50
    geometry = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2), "groups": 2}
    node = QuantizedConvolution("y", ["x", "r"], weight, bias, (-20.0, 50.0), **geometry, scale=scale, grids=grids)
    x = torch.randint(0, 256, (2, 4, 5, 6), dtype=torch.uint8)
    y = node.run({"x": x, "r": (r := torch.randint(0, 256, (2, 4, 3, 6), dtype=torch.uint8))})
    assert (y.dtype, y.shape) == (torch.uint8, (2, 4, 3, 6))
    f32 = np.float32
    for n, c, i, j in itertools.product(*map(range, y.shape)):
        total = int(bias[c])
        for k, u, v in itertools.product(range(2), range(3), range(2)):
            row, column = 2 * i + u - 1, j + 2 * v - 1
            if 0 <= row < 5 and 0 <= column < 6:
                total += (int(x[n, c // 2 * 2 + k, row, column]) - 3) * int(weight[c, k, u, v])
        steps = f32(total) * f32(np.float64(scale[c]) * 0.0625 / 0.5) + f32(int(r[n, c, i, j]) - 7) * f32(0.5)
        assert int(y[n, c, i, j]) == int(np.round(np.clip(steps, f32(-40), f32(100)))) + 100


def test_grids_hold_zero_and_their_ends():
    for low, high in ((-1.0, 3.0), (0.0, 6.0), (-2.0, 0.0), (1.0, 2.0), (0.0, 0.0)):
        grid = Grid.over(low, high)
        ends = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])
        decoded = grid.decode(grid.encode(ends))
        assert decoded[1] == 0
        torch.testing.assert_close(decoded, ends, rtol=0, atol=grid.scale * 0.51)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5])
    assert Grid(1.0, 10).encode(odd).tolist() == [10, 255, 0, 10]


def test_a_network_stays_close_and_its_zeros_stay_zeros(mixed, quantized):
    assert [bool(layer.left) for layer in quantized.report.layers] == [False] * 5
    assert all(0 < layer.alone < 0.05 and 0 < layer.together < 0.1 for layer in quantized.report.layers)
    assert quantized.report.error < 0.05
    assert quantized.report.accuracy == pytest.approx((1.0, 1.0), abs=0.2)
    state = quantized.state_dict()
    for name in ("stem.0", "one", "two", "deep", "head"):
        weight = state[f"weights.{name}.weight"]
        assert weight.dtype == torch.int8
        assert not weight[mixed.get_submodule(name).weight == 0].any()
    assert "int8" in str(quantized)


def test_values_stay_codes_between_layers(quantized):
    graph = quantized.graph
    assert sum(isinstance(node, Quantize) for node in graph.nodes) == 2  # the image, and what the classifier reads
    assert not any(isinstance(node, Dequantize) for node in graph.nodes)
    assert [type(node) for node in graph.layers()] == [QuantizedConvolution] * 4 + [QuantizedLinear]
    assert any(isinstance(node, QuantizedMean) for node in graph.nodes)
    cat = next(node for node in graph.nodes if isinstance(node, Call) and "cat" in str(node.target))
    assert all(name.endswith(".u8") for name in cat.inputs)
    stem, _, two, deep, _ = graph.layers()
    assert stem.grids[1] == two.grids[1] == two.grids[2] == deep.grids[0]  # what is concatenated has one grid


class Gated(nn.Module):
    """Activations that need a table of codes, one of them after a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.one(x))
        return F.silu(self.two(y) + y)


def test_values_inside_of_layers_cost_no_second_run(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model, x, ran = prune(Gated(), 0.5), torch.randn(2, 3, 9, 9), []
    calibration = _Calibration(deploy.compile_sparse(model, x, tune=False), [(x,)], "minmax")
    run = Convolution.run
    monkeypatch.setattr(Convolution, "run", lambda node, values: (ran.append(node.name), run(node, values))[1])
    calibration._grids("minmax")
    assert len(ran) == 4  # Each layer once for the ends of the ranges, and once for the counts.
    with torch.no_grad():
        first = model.one(x)
        y = F.hardswish(first)
        inside = [first, model.two(y), model.two(y) + y]
    one, two = (node.name for node in calibration.graph.layers())
    found = [calibration.befores[one], calibration.sums[two], calibration.befores[two]]
    for grid, value in zip(found, inside, strict=True):
        assert grid.scale == pytest.approx(Grid.over(float(value.min()), float(value.max())).scale, rel=1e-5)
    assert calibration.sums.keys() == {two}


@pytest.mark.parametrize("method", METHODS)
def test_one_outlier(method: str):
    """An outlier takes the whole range with "minmax"; the others cut it off."""
    torch.manual_seed(0)
    x = torch.randn(2**20).clamp(-4, 4)
    x[0] = 20.0
    seen = Range()
    for note in (seen.widen, seen.count):
        for part in x.chunk(3):
            note(part)
    grid = seen.grid(method)
    whole = (20 + 4) / 255
    assert grid.scale == pytest.approx(whole, rel=0.05) if method == "minmax" else grid.scale < 0.6 * whole


def test_what_stays_in_float32(batches):
    """A linear layer with an activation, and layers above the bound; the compiled network is the model then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 17 * 21, 5), nn.GELU()).eval()
    left = deploy.quantize(model, batches, bound=1e-6)
    first, second = left.report.layers
    assert "above" in first.left
    assert first.alone > 1e-6
    assert "gelu" in second.left
    compiled = deploy.compile_sparse(left, batches[0])
    torch.testing.assert_close(compiled(batches[0]), model(batches[0]).detach(), rtol=1e-4, atol=1e-4)


def test_compiled_is_equal_saved_loaded_copied_packed(tmp_path: Path, quantized, batches):
    compiled = deploy.compile_sparse(quantized, batches[0])
    for x in (batches[1], batches[1][:1], torch.randn(2, 3, 19, 23) * 9):
        assert torch.equal(compiled(x), quantized(x))
    assert "int8" in {choice.execution for _, choice in compiled.layers()}  # Time decides about each layer.
    assert {kind for _, kind, _ in compiled.profile(batches[0])} >= {
        "copy",
        "convolution",
        "depthwise",
        "linear",
        "pool",
    }
    compiled.save(tmp_path / "net")
    assert torch.equal(deploy.load_sparse(tmp_path / "net")(batches[0]), quantized(batches[0]))
    assert torch.equal(copy.deepcopy(compiled)(batches[0]), quantized(batches[0]))
    deploy.pack(quantized, tmp_path / "packed")
    state = deploy.unpack(tmp_path / "packed")
    assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())
    other = copy.deepcopy(quantized)
    for node in other.graph.layers():
        node.weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(batches[0]), quantized(batches[0]))


class Modern(nn.Module):
    """TensorFlow's padding, activations that need a table, squeeze and excitation, an average pool, a sum by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.deep, self.last = nn.Conv2d(8, 8, 3, 2, groups=8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.stem(F.pad(x, (0, 1, 0, 1))))
        y = y * torch.sigmoid(self.up(F.silu(self.down(y.mean((2, 3), keepdim=True)))))
        y = F.avg_pool2d(F.leaky_relu(self.deep(F.pad(y, (0, 1, 0, 1))), 0.1), 2)
        return self.last(y + torch.relu(y)).mean((2, 3))


def test_tables_gates_average_pools_and_padding_are_on_integers(tmp_path: Path, chosen):
    torch.manual_seed(0)
    model, x = prune(Modern(), 0.7), torch.randn(4, 3, 32, 40)
    quantized = deploy.quantize(model, [x])
    assert not any(layer.left for layer in quantized.report.layers)
    assert quantized.report.error < 0.05
    graph = quantized.graph
    assert sum(isinstance(node, Quantize) for node in graph.nodes) == 2  # the image, and what the excitation reads
    assert sum(isinstance(node, Dequantize) for node in graph.nodes) == 1  # the excitation's factors
    assert any(isinstance(node, QuantizedGate) for node in graph.nodes)
    assert all(isinstance(node, QuantizedConvolution) for node in graph.layers())
    (first, *_) = graph.layers()
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(first.table, first.grids[1].encode(F.hardswish(first.before.decode(codes))))
    chosen(Choice("int8", 3, 2, 2))
    compiled = deploy.compile_sparse(quantized, x)
    assert torch.equal(compiled(x), quantized(x))
    assert not any(kind == "torch" for _, kind, _ in compiled.profile(x))
    compiled.save(tmp_path / "net")
    assert torch.equal(deploy.load_sparse(tmp_path / "net")(x[:1]), quantized(x[:1]))
    chosen(Choice("sparse", 3, 2, 2))
    floats = deploy.compile_sparse(model, x)
    assert not any(kind == "torch" for _, kind, _ in floats.profile(x))
    torch.testing.assert_close(floats(x), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("copy_ms", "best"), [(0.1, "abc"), (0.01, "ac"), (0.6, "")])
def test_the_fastest_mixture_counts_the_edges(copy_ms: float, best: str):
    times = {"a": (1.0, 0.5), "b": (1.0, 1.05), "c": (1.0, 0.5)}

    def edges(integers: set[str]) -> Graph:
        """A chain: a copy wherever one layer is on integers and the next is not."""
        chain = ["", *(name if name in integers else "" for name in times), ""]
        return Graph(
            [Quantize("", ["x"], Grid(1.0, 0)) for one, two in itertools.pairwise(chain) if bool(one) != bool(two)], []
        )

    assert select(set(times), times, edges, {"x": (1,)}, lambda shape: copy_ms) == set(best)


def test_layers_that_are_not_faster_stay_in_float32(mixed, batches, monkeypatch: pytest.MonkeyPatch):
    """The fastest of the timed networks is returned; here one of them says that it is the fastest."""
    kept: list[frozenset[str]] = []

    def choose_one(chosen: set[str], *_: object) -> frozenset[str]:
        kept.append(frozenset(sorted(chosen)[:-1]))
        return kept[0]

    monkeypatch.setattr(faster, "select", choose_one)
    monkeypatch.setattr(Stopwatch, "race", lambda self, calls, *_, **__: {key: float(key not in kept) for key in calls})
    quantized = deploy.quantize(mixed, batches, example=batches[0][:1])
    (left,) = [layer.left for layer in quantized.report.layers if layer.left]
    assert "1.000 ms in float32" in left
    assert sum(isinstance(node, QuantizedConvolution | QuantizedLinear) for node in quantized.graph.layers()) == 4


def test_hostile_numbers(tmp_path: Path, quantized, batches):
    """Sums beyond 32 bits, scales and zeros that are none, tensors of other dtypes: refused in one line."""
    deploy.compile_sparse(quantized, batches[0], tune=False).save(tmp_path / "net")
    record, tensors = deploy.inspect(tmp_path / "net").metadata["sparse"], deploy.unpack(tmp_path / "net")
    layers = [node for node in record["nodes"] if node["kind"] == "QuantizedConvolution"]
    key = {field: layers[1][field]["tensor"] for field in ("weight", "bias", "scale")}
    big = torch.full_like(tensors[key["bias"]], 2**31 - 1)
    bad = {
        "bias": [big, big.float()],
        "scale": [torch.full(big.shape, value) for value in (0.0, -1.0, float("inf"), 3e38)],
        "weight": [torch.full_like(tensors[key["weight"]], -128), tensors[key["weight"]].float()],
    }
    cases = [({}, {key[field]: value}) for field, values in bad.items() for value in values]
    for grid in ([1.0, 256], [1.0, -1], [0.0, 0], [-1.0, 0], [0.1, 0], [1.0, 0.5], ["1", 0], [1.0]):
        every = {"tuple": [{"tuple": grid}, *layers[1]["grids"]["tuple"][1:]]}
        cases.append(({"grids": every}, {}))
    cases += [({"grids": {"tuple": layers[1]["grids"]["tuple"][:1]}}, {}), ({"activation": "gelu"}, {})]
    table = {"tensor": key["scale"]}
    cases += [({"table": table, "before": {"tuple": [1.0, 0]}}, {}), ({"before": {"tuple": [1.0, 0]}}, {})]
    for fields, values in cases:
        changed = copy.deepcopy(record)
        next(node for node in changed["nodes"] if node["name"] == layers[1]["name"]).update(fields)
        deploy.pack({**tensors, **values}, tmp_path / "bad", metadata={"sparse": changed}, plain_zeros=True)
        with pytest.raises(ValueError, match=r"^[^\n]*$"):
            deploy.load_sparse(tmp_path / "bad")


def test_wrong_arguments(mixed, quantized, batches):
    with pytest.raises(ValueError, match="method"):
        deploy.quantize(mixed, batches, method="best")
    with pytest.raises(ValueError, match="bound"):
        deploy.quantize(mixed, batches, bound=0)
    with pytest.raises(ValueError, match="batch"):
        deploy.quantize(mixed, [])
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        deploy.quantize(mixed, torch.zeros(1, 3, 8, 8))
    for made in (quantized, deploy.compile_sparse(nn.Linear(3, 3).eval(), torch.zeros(1, 3), tune=False)):
        with pytest.raises(TypeError, match=f"got a {type(made).__name__}"):
            deploy.quantize(made, batches)
    with pytest.raises(ValueError, match="labels"):
        deploy.quantize(mixed, batches, labels=[torch.zeros(4)])
    with pytest.raises(ValueError, match="inference"):
        quantized.train()
