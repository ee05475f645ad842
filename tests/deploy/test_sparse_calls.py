"""Arguments, results, torch.compile around and before a compiled network, threads."""

import dataclasses
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from str_triton import deploy
from str_triton.deploy.sparse import backend
from str_triton.deploy.sparse.agree import takes_more
from str_triton.deploy.sparse.executions.choice import Choice
from tests.deploy.sparse_networks import Excite, Two, prune, same

METADATA = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


class Branches(nn.Module):
    """A model whose forward depends on the size of the image and of the batch."""

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
    with pytest.raises(ValueError, match=r"for 0\.5 .*argument 3.* got 0\.25"):
        loaded(ids, mask=mask, scale=0.25)
    with pytest.raises(ValueError, match=r"torch\.int64.* got torch\.float32"):
        compiled(ids.float(), mask=mask, scale=0.5)


def test_a_size_for_which_only_the_exported_graph_fails(by_kernels, monkeypatch):
    """The model takes the call, as for an attention with no sequences; without it the error of the graph is raised."""
    model, x = nn.Linear(6, 3).eval(), torch.randn(0, 6)
    compiled = deploy.compile_sparse(model, torch.randn(2, 6))
    example = (torch.randn(2, 6),), {}
    assert not takes_more(model, compiled.graph, compiled.signature, *example)
    assert takes_more(model, SimpleNamespace(run=_fails), compiled.signature, *example)
    monkeypatch.setattr("str_triton.deploy.sparse.model.try_out", _fails)
    with pytest.raises(RuntimeError, match="a reshape"):
        compiled(x)
    compiled._held_source = (model,)
    assert compiled(x).shape == (0, 3)


class Pair(nn.Module):
    """A layer of two arguments side by side, which must have the same batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(torch.cat((x, y), 1))


def test_a_model_may_take_another_batch_of_all_its_arguments_together() -> None:
    """A signature with a fixed batch excludes that, although the model takes no single argument of another batch."""
    model, example = Pair().eval(), (torch.randn(3, 6), torch.randn(3, 6))
    compiled = deploy.compile_sparse(model, example, tune=False)
    leaves = [dataclasses.replace(leaf, sizes=(3, 6)) for leaf in compiled.signature.leaves]
    closed = dataclasses.replace(compiled.signature, leaves=leaves, guards=[])
    assert takes_more(model, compiled.graph, closed, example, {})
    assert not takes_more(model, compiled.graph, compiled.signature, example, {})


def test_a_guard_is_stated_with_the_dimensions_that_it_is_about(tmp_path: Path) -> None:
    deploy.compile_sparse(Branches().eval(), torch.randn(1, 2, 9, 9), tune=False).save(tmp_path / "net")
    with pytest.raises(ValueError, match=r"(\w+) = 3; \1 is dimension 2 of the input"):
        deploy.load_sparse(tmp_path / "net")(torch.randn(1, 2, 3, 9))


def test_a_quantized_recurrent_network_takes_one_sequence_after_batches() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0][:, -1])

    x = torch.randn(4, 5, 8)
    quantized = deploy.quantize(Last().eval(), [x[:2], x[2:]])
    compiled = deploy.compile_sparse(quantized, x[:1], tune=False)
    torch.testing.assert_close(torch.cat([compiled(x[:1]), compiled(x[1:])]), quantized(x), rtol=1e-4, atol=1e-5)


def _fails(*_: object) -> None:
    raise RuntimeError("a reshape of no elements")


def test_a_wrong_shape_is_stated_without_symbols(tmp_path):
    deploy.compile_sparse(nn.Linear(20, 3).eval(), torch.randn(2, 20), tune=False).save(tmp_path / "net")
    with pytest.raises(ValueError, match=r"\[any, 20\].* got \[1, 5\]"):
        deploy.load_sparse(tmp_path / "net")(torch.randn(1, 5))


def test_no_depthwise_layer_with_dilation_runs_channels_last(chosen):
    chosen(Choice("channels_last"))
    model = prune(nn.Sequential(nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)), 0.5)
    x = torch.randn(2, 16, 12, 12)
    compiled = deploy.compile_sparse(model, x)
    compiled.choices = {name: Choice("dense") for name in compiled.choices}
    compiled._plans.clear()
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


class Times(nn.Module):
    """A model whose result has another dtype or value for numbers that are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, number: float) -> tuple[Tensor, Tensor]:
        return self.conv(x) * number, torch.arange(3) * number


@pytest.mark.parametrize(("example", "others"), [(2, (2.0, 3, 2)), (True, (1, 1.0)), (0.0, (-0.0, 0))])
def test_equal_constants_of_other_types(by_kernels, example: float, others: tuple[float, ...]):
    model, x = Times().eval(), torch.randn(1, 2, 3, 3)
    compiled = deploy.compile_sparse(model, (x, example))
    for number in (example, *others):
        found, wanted = compiled(x, number), model(x, number)
        assert [t.dtype for t in found] == [t.dtype for t in wanted]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(found[1].signbit(), wanted[1].signbit())


def test_tensors_without_memory_of_their_own(by_kernels):
    """A dispatch mode or a transformation hands over tensors whose address is null."""
    model, x = prune(Two(F.silu), 0.3), torch.randn(2, 16, 6, 6)
    compiled = deploy.compile_sparse(model, x)
    with torch.no_grad():
        wanted = model(x)
    with FakeTensorMode():
        assert compiled(torch.empty(2, 16, 6, 6)).shape == wanted.shape
    assert torch.allclose(compiled(x), wanted, atol=1e-4)  # What was planned for fakes is not used.
    traced = make_fx(compiled)(x)
    other = torch.randn(2, 16, 6, 6)
    assert torch.allclose(traced(other), compiled(other))
    assert torch.allclose(torch.func.functionalize(compiled)(x), wanted, atol=1e-4)
    many = torch.randn(3, 2, 16, 6, 6)
    assert torch.allclose(torch.vmap(compiled)(many), torch.stack([compiled(each) for each in many]))
    for derivative in (
        lambda: torch.func.grad(lambda x: compiled(x).sum())(x),
        lambda: torch.func.jvp(compiled, (x,), (x,)),
        lambda: torch.func.grad(lambda many: torch.vmap(compiled)(many).sum())(many),
    ):
        with pytest.raises(ValueError, match="no derivative"):
            derivative()


def test_torch_compile_of_what_a_network_leaves_to_its_model(by_kernels):
    torch.compiler.reset()
    model, flagged = Branches().eval(), Times().eval()
    compiled = torch.compile(deploy.compile_sparse(model, torch.randn(1, 2, 9, 9)), backend="eager")
    with torch.no_grad():
        for shape in ((1, 2, 3, 3), (1, 2, 9, 9), (1, 2, 4, 9)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), model(x))
        compiled = torch.compile(deploy.compile_sparse(flagged, (x, True)), backend="eager")
        for number in (True, 3.0):
            torch.testing.assert_close(compiled(x, number), flagged(x, number))
