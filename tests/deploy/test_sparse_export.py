"""compile_sparse on what people write in a forward: every exportable model is right."""

import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse.fallback import ModulewiseModel
from str_triton.deploy.sparse.graph.limit import Limit
from tests.deploy.sparse_networks import Excite, Two, prune, same
from tests.messages import holds

METADATA = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


CHANGES = {
    "narrow": lambda y: y.narrow(1, 0, 8).add_(1.0),
    "select": lambda y: y.select(1, 0).mul_(30.0),
    "detach": lambda y: y.detach().add_(1.0),
    "diagonal": lambda y: y.diagonal(dim1=2, dim2=3).fill_(5.0),
    "unflatten": lambda y: y.unflatten(1, (2, 8)).add_(1.0),
    "out": lambda y: torch.add(y, 1.0, out=y),
    "index": lambda y: y.__setitem__((slice(None), 3), 2.0),
    "base of a view": lambda y: (y.flatten(1), y.relu_())[0].view(y.shape),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place(by_kernels, change: str):
    model = prune(Two(lambda y: None if CHANGES[change](y) is None else y), 0.3)
    compiled = deploy.compile_sparse(model, torch.randn(1, 16, 6, 6))
    assert isinstance(compiled, deploy.SparseModel)
    for shape in ((1, 16, 6, 6), (3, 16, 6, 6)):
        same(model, compiled, torch.randn(shape))


@pytest.mark.parametrize("product", [torch.matmul, torch.mm, lambda x, w: torch.addmm(w[0], x, w)])
def test_a_product_with_a_weight_is_a_layer(by_kernels, product: Callable):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4) * (torch.rand(6, 4) < 0.3))

        def forward(self, x: Tensor) -> Tensor:
            return product(x, self.weight)

    model = Product()
    compiled = deploy.compile_sparse(model, torch.randn(3, 6))
    assert len(compiled.choices) == 1
    same(model, compiled, torch.randn(2, 6))


def test_a_clamp_with_its_limits_swapped(by_kernels):
    model = prune(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), 0.5)
    model[0].register_forward_hook(lambda module, args, y: y.clamp(2.0, -1.0))
    compiled = deploy.compile_sparse(model, torch.randn(3, 6))
    assert isinstance(compiled, deploy.SparseModel)
    same(model, compiled, torch.randn(2, 6))


def test_whatever_stands_in_the_way_of_the_graph_the_layers_are_compiled(monkeypatch, by_kernels):
    def fail(*_: object) -> None:
        raise KeyError("no such node")

    monkeypatch.setattr("str_triton.deploy.sparse.compile.lower", fail)
    model = prune(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(3, 6))
    assert "KeyError" in str(compiled)
    same(model, compiled, torch.randn(2, 6))


@pytest.mark.parametrize("linear", [True, False])
def test_rows_chosen_by_a_mask(by_kernels, linear: bool):
    def between(y: Tensor) -> Tensor:
        return y[y.flatten(1)[:, 0] > 0]

    model = prune(Two(between, linear), 0.3)
    tail = (16,) if linear else (16, 5, 5)
    compiled = deploy.compile_sparse(model, torch.randn(8, *tail))
    assert isinstance(compiled, deploy.SparseModel)
    for _ in range(5):
        same(model, compiled, torch.randn(8, *tail))
    same(model, compiled, torch.randn(3, *tail))


@pytest.mark.parametrize("setting", ["autocast", "dtype", "device"])
def test_what_torch_has_by_default_is_ignored(by_kernels, setting: str):
    model, x = prune(Two(F.gelu), 0.3), torch.randn(2, 16, 6, 6)
    compiled = deploy.compile_sparse(model, x)
    wanted = compiled(x)
    try:
        if setting == "dtype":
            torch.set_default_dtype(torch.float64)
        if setting == "device":
            torch.set_default_device("meta")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            again, other = deploy.compile_sparse(model, x)(x), compiled(x)
            assert torch.get_default_dtype() == (torch.float64 if setting == "dtype" else torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)  # "cpu" would leave a mode, which turns off torch's fast path of attention
    for found in (again, other):
        assert (found.dtype, found.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(found, wanted)


def test_a_norm_is_folded_along_its_own_dimension(by_kernels):
    for outputs in (5, 3):
        model = prune(nn.Sequential(nn.Linear(8, outputs), nn.BatchNorm2d(3)), 0.5)
        same(model, deploy.compile_sparse(model, torch.randn(2, 3, 4, 8)), torch.randn(2, 3, 4, 8))


@pytest.mark.parametrize("mean", [((2, 3), True), ((-2, -1), True)])
def test_squeeze_and_excitation(by_kernels, mean: tuple):
    model = prune(Excite(*mean), 0.4)
    compiled = deploy.compile_sparse(model, torch.randn(1, 3, 9, 9))
    assert isinstance(compiled, deploy.SparseModel)
    # Many images of a size whose groups run one after the other: values that torch has in between are whole.
    for shape in ((1, 3, 9, 9), (3, 3, 12, 7), (6, 3, 120, 90), (0, 3, 9, 9)):
        same(model, compiled, torch.randn(shape))


def test_the_time_of_the_export_is_limited(monkeypatch, by_kernels):
    model, x = prune(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), 0.5), torch.randn(3, 6)
    with monkeypatch.context() as patch:
        patch.setattr("str_triton.deploy.sparse.compile.SECONDS", 0.0)
        compiled = deploy.compile_sparse(model, x)
    assert isinstance(compiled, ModulewiseModel)
    assert holds(str(compiled), "torch.export .. TimeoutError .. after 0 s")
    same(model, compiled, torch.randn(2, 6))
    with monkeypatch.context() as patch:
        patch.setattr(Limit, "share", lambda self, part: Limit(0.0))
        compiled = deploy.compile_sparse(model, x)
    assert isinstance(compiled, deploy.SparseModel)
    assert holds(str(compiled), "no size may differ .. TimeoutError")
    same(model, compiled, x)
    same(model, compiled, torch.randn(2, 6))  # by the model itself
    assert deploy.compile_sparse(model, x).notes == []


def test_an_export_with_other_values_is_the_last_of_its_kind(monkeypatch, by_kernels):
    """The second export, for a batch of one, is of no use then."""
    counts = Counter()
    export = torch.export.export

    def counted(*args: object, **kwargs: object) -> torch.export.ExportedProgram:
        counts["exports"] += 1
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    model = prune(Two(lambda y: y + float(torch.compiler.is_exporting()) + (y.shape[0] == 1)), 0.3)
    compiled = deploy.compile_sparse(model, torch.randn(2, 16, 5, 5))
    assert "gives other values" in str(compiled)
    assert counts["exports"] == 3
