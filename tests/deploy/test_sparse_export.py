"""compile_sparse on what people write in a forward: every exportable model is right, and what cannot be falls back."""

import copy
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton import deploy
from str_triton.deploy.sparse import backend
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.fallback import ModulewiseModel
from str_triton.deploy.sparse.graph import export
from tests.deploy.sparse_networks import prune, same

METADATA = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


class Two(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor | None], linear: bool = False) -> None:
        super().__init__()
        layers = [nn.Linear(16, 16), nn.Linear(16, 16)] if linear else [nn.Conv2d(16, 16, 3, padding=1) for _ in "ab"]
        self.first, self.last = layers
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.between(y)
        return self.last(y if z is None else z)


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
        torch.set_default_device("cpu")
    for found in (again, other):
        assert (found.dtype, found.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(found, wanted)


def test_a_norm_is_folded_along_its_own_dimension(by_kernels):
    for outputs in (5, 3):
        model = prune(nn.Sequential(nn.Linear(8, outputs), nn.BatchNorm2d(3)), 0.5)
        same(model, deploy.compile_sparse(model, torch.randn(2, 3, 4, 8)), torch.randn(2, 3, 4, 8))


class Excite(nn.Module):
    def __init__(self, *mean: object) -> None:
        super().__init__()
        self.mean = mean
        self.first, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.first(x))
        z = y * torch.sigmoid(self.up(torch.relu(self.down(y.mean(*self.mean)))))
        return y + self.last(z)


@pytest.mark.parametrize("mean", [((2, 3), True), ((-2, -1), True)])
def test_squeeze_and_excitation(by_kernels, mean: tuple):
    model = prune(Excite(*mean), 0.4)
    compiled = deploy.compile_sparse(model, torch.randn(1, 3, 9, 9))
    assert isinstance(compiled, deploy.SparseModel)
    # Many images of a size whose groups run one after the other: values that torch has in between are whole.
    for shape in ((1, 3, 9, 9), (3, 3, 12, 7), (6, 3, 120, 90), (0, 3, 9, 9)):
        same(model, compiled, torch.randn(shape))


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


class Branches(nn.Module):
    """Its forward depends on the size of the image and of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y * 3 if x.shape[2] > 5 else y - 1
        return y + 1 if x.shape[0] == 1 else y


@pytest.mark.parametrize("example", [(1, 2, 9, 9), (2, 2, 3, 3)])
def test_branches_on_sizes(by_kernels, tmp_path, example: tuple[int, ...]):
    model = Branches().eval()
    compiled = deploy.compile_sparse(model, torch.randn(example))
    for shape in ((1, 2, 9, 9), (1, 2, 3, 3), (2, 2, 3, 3), (4, 2, 9, 2)):
        same(model, compiled, torch.randn(shape))
    compiled.save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")
    same(model, loaded, torch.randn(example))
    with pytest.raises(ValueError, match="compiled for sizes with"):  # It has no other branch.
        loaded(torch.randn(3, 2, 4, 9) if example[0] == 1 else torch.randn(3, 2, 7, 9))


class Tokens(nn.Module):
    """A small transformer: token ids and a mask in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 16), nn.Embedding(20, 16)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        where = None if mask is None else mask[:, None, None, :]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, where).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x))) * scale
        return {"last": x, "pooled": (x.mean(1), x[:, 0].argmax(-1))}


def test_arguments_and_results_of_many_kinds(by_kernels, tmp_path):
    model = prune(Tokens(), 0.3)
    ids, mask = torch.randint(50, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    compiled = deploy.compile_sparse(model, (ids,), {"mask": mask, "scale": 0.5})
    assert isinstance(compiled, deploy.SparseModel)
    compiled.save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")
    for shape in ((2, 7), (1, 7), (5, 11)):
        ids, mask = torch.randint(50, shape), torch.rand(shape) < 0.8
        mask[:, 0] = True
        with torch.no_grad():
            wanted = model(ids, mask, scale=0.5)
        for network in (compiled, loaded):
            torch.testing.assert_close(network(ids, mask=mask, scale=0.5), wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(network(ids, scale=0.5, mask=mask), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"compiled for 0\.5 as argument 3, got 0\.25"):
        loaded(ids, mask=mask, scale=0.25)
    with pytest.raises(ValueError, match=r"torch\.int64 on the CPU, got torch\.float32"):
        compiled(ids.float(), mask=mask, scale=0.5)


def test_no_depthwise_layer_with_dilation_runs_channels_last(chosen):
    chosen(Choice("channels_last"))
    model = prune(nn.Sequential(nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)), 0.5)
    x = torch.randn(2, 16, 12, 12)
    compiled = deploy.compile_sparse(model, x)
    compiled.choices = {name: Choice("dense") for name in compiled.choices}
    same(model, compiled, x)
    torch.testing.assert_close(compiled(x.contiguous(memory_format=torch.channels_last)), compiled(x))


@pytest.mark.parametrize("execution", ["dense", "channels_last", "csr", "sparse"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 7), lambda: nn.Conv2d(12, 7, 1)])
def test_empty_batches_by_every_execution(chosen, execution: str, make: Callable[[], nn.Module]):
    chosen(Choice(execution))
    model = prune(nn.Sequential(make()), 0.3)
    x = torch.randn(3, 12, *([5, 4] if isinstance(model[0], nn.Conv2d) else []))
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    assert compiled(x[:0]).shape == model(x[:0]).shape


def test_inside_torch_compile_and_export(by_kernels):
    model, x = prune(Two(F.silu), 0.3), torch.randn(2, 16, 6, 6)
    compiled = deploy.compile_sparse(model, x)
    outer = nn.Sequential(nn.Conv2d(16, 16, 1), compiled, nn.ReLU()).eval()
    with torch.no_grad():
        wanted = outer(x)
        found = torch.compile(outer, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(found, wanted)
        sizes = ({0: torch.export.Dim.DYNAMIC},)
        exported = torch.export.export(outer, (x,), dynamic_shapes=sizes, strict=False).module()
        torch.testing.assert_close(exported(x), wanted)
        other = torch.randn(5, 16, 6, 6)
        torch.testing.assert_close(exported(other), outer(other))


def test_as_a_backend_of_torch_compile(by_kernels):
    (entry,) = METADATA["entry-points"]["torch_dynamo_backends"].items()
    assert entry == ("str_sparse", f"{backend.__name__}:str_sparse")
    model = prune(nn.Sequential(Excite((2, 3), True), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 49, 3)), 0.3)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend.str_sparse, options={"tune": True})
    for _ in range(2):
        with torch.no_grad():
            for batch in (2, 3, 1, 5):
                x = torch.randn(batch, 3, 9, 9)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
            model[3].weight.mul_(2.0)  # What changes in place is noticed.
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None


def test_threads_take_turns(by_kernels):
    model = prune(Two(F.silu), 0.3)
    compiled = deploy.compile_sparse(model, torch.randn(1, 16, 6, 6))
    found: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        x = torch.randn(1 + number, 16, 6, 6)
        with torch.no_grad():
            wanted = model(x)
        found[number] = [torch.allclose(compiled(x), wanted, atol=1e-4) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    assert all(map(all, found.values()))


def test_without_tuning(kernels):
    model, x = prune(Excite((2, 3), True), 0.1), torch.randn(1, 3, 20, 20)
    compiled = deploy.compile_sparse(model, x, tune=False)
    same(model, compiled, x)
    assert all(choice.ms is not None for _, choice in compiled.layers())
