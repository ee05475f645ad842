"""Buffers that calls change, sizes that an export fixes, and models that cannot be exported."""

import copy
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse.fallback import ModulewiseModel
from str_triton.deploy.sparse.graph import export
from tests.deploy.sparse_networks import Two, prune, same

METADATA = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


class Counter(nn.Module):
    """It keeps a state in a buffer, and changes its argument."""

    def __init__(self, replaces: bool = False) -> None:
        super().__init__()
        self.conv, self.replaces = nn.Conv2d(2, 2, 1), replaces
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.seen = self.seen + 1
        else:
            self.seen += 1
        x.mul_(2)
        return self.conv(x) * self.seen


@pytest.mark.parametrize("replaces", [True, False])
def test_state(by_kernels, replaces: bool):
    model = Counter(replaces).eval()
    compiled = deploy.compile_sparse(model, torch.randn(1, 2, 3, 3))
    assert isinstance(compiled, deploy.SparseModel)
    for shape in ((1, 2, 3, 3), (2, 2, 4, 4), (1, 2, 3, 3)):
        x = torch.randn(shape)
        theirs, ours = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(compiled(ours), model(theirs))
        torch.testing.assert_close(ours, theirs)
    assert float(copy.deepcopy(compiled).state()["seen"]) == 3


def test_state_of_a_submodule_that_is_replaced(by_kernels):
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return x * (self.seen > 3)  # seen by nobody in the first calls

    model = nn.Sequential(nn.Linear(2, 2), Counts()).eval()
    compiled = deploy.compile_sparse(model, torch.randn(1, 2))
    assert isinstance(compiled, deploy.SparseModel)
    for _ in range(5):
        x = torch.randn(1, 2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_sizes_that_an_export_fixes_go_to_the_model(by_kernels):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            keep = torch.arange(len(x)) % 2 == 0
            y = x.index_put((keep,), self.first(x)[::2])
            y.flatten(0).clamp_(max=1.0)
            return self.last(y)

    model = prune(Rows(), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(2, 4))
    assert isinstance(compiled, deploy.SparseModel)
    for rows in (2, 4, 1, 5):
        same(model, compiled, torch.randn(rows, 4))


@pytest.mark.parametrize("batch", [1, 2])
def test_conditions_of_memory_formats_leave_the_batch_open(by_kernels, tmp_path, batch: int):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
            self.last = nn.Conv2d(8, 8, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(x)
            return self.last(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    model = prune(nn.Sequential(Block(), Block()), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(batch, 8, 8, 8))
    assert isinstance(compiled, deploy.SparseModel)
    compiled.save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")
    for other in (1, 2, 5):
        same(model, loaded, torch.randn(other, 8, 8, 8))


def test_a_norm_by_the_batch_takes_no_images(by_kernels):
    def change(y: Tensor) -> None:
        y.narrow(1, 0, 2).add_(1.0)  # which lets torch decompose the norm

    model = nn.Sequential(nn.BatchNorm2d(16, track_running_stats=False), prune(Two(change), 0.5)).eval()
    compiled = deploy.compile_sparse(model, torch.randn(2, 16, 5, 5))
    assert isinstance(compiled, deploy.SparseModel)
    for batch in (2, 0):
        same(model, compiled, torch.randn(batch, 16, 5, 5))


@pytest.mark.parametrize("missing", ["option", "conditions"])
def test_without_the_private_names_of_torch(by_kernels, monkeypatch, missing: str):
    if missing == "option":
        monkeypatch.setattr(export, "shapes_config", SimpleNamespace())
    else:
        monkeypatch.setattr(export, "symbolic_shapes", SimpleNamespace())
    model = prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(2, 3, 6, 6))
    assert isinstance(compiled, deploy.SparseModel)
    assert len(compiled.choices) == 2
    for shape in ((2, 3, 6, 6), (1, 3, 6, 6), (4, 3, 9, 5)):
        same(model, compiled, torch.randn(shape))


def test_nothing_is_printed_about_what_cannot_be_exported(by_kernels, capfd):
    model = prune(Two(lambda y: y[: int(y.sum() > 0) + 1], linear=True), 0.5)
    deploy.compile_sparse(model, torch.randn(3, 16), tune=False)
    assert capfd.readouterr() == ("", "")


class Remembers(nn.Module):
    """It keeps a state where no export finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(2, 2, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_hidden_state_falls_back(by_kernels):
    model = Remembers().eval()
    compiled = deploy.compile_sparse(model, torch.randn(1, 2, 3, 3))
    assert isinstance(compiled, ModulewiseModel)
    for _ in range(3):
        x = torch.randn(1, 2, 3, 3)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


class Hides(nn.Module):
    """It keeps a state in a buffer that is not there yet, in an attribute, or in a parameter."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.linear, self.where, self.last = nn.Linear(4, 4), where, None
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "parameter":
            with torch.no_grad():
                self.linear.bias.add_(1.0)
            return self.linear(x)
        name = "late" if self.where == "buffer" else "last"
        old = getattr(self, name)
        setattr(self, name, x if old is None or old.shape != x.shape else old * 0.5 + x)
        return self.linear(getattr(self, name))


@pytest.mark.parametrize("where", ["buffer", "attribute", "parameter"])
def test_state_that_no_export_keeps(by_kernels, where: str):
    model = prune(Hides(where), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(2, 4))
    for rows in (2, 2, 3, 2):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_layers_inside_of_a_vmap(by_kernels):
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = prune(nn.Linear(4, 4), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.linear)(x) if float(x.sum()) else x

    mapped = Mapped().eval()
    same(mapped, deploy.compile_sparse(mapped, torch.randn(3, 4)), torch.randn(2, 4))


def test_what_a_network_falls_back_to_is_no_submodule(by_kernels):
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * 2 if len(x) > 2 else self.linear(x)

    model = prune(Sized(), 0.5)
    compiled = deploy.compile_sparse(model, torch.randn(2, 4)).half()
    assert not compiled.state_dict()
    for rows in (1, 2, 5):
        same(model, compiled, torch.randn(rows, 4))
    with pytest.raises(ValueError, match="layout"):
        compiled(torch.randn(2, 4).to_sparse())
