"""compile_sparse: whole networks give what torch gives, whatever they are made of and wherever they run."""

import copy
import stat
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from cnn.models import build as build_network
from cnn.resnet import Bottleneck, ResNet
from str_triton import deploy, sparsify
from str_triton.deploy.sparse import build, timing
from str_triton.deploy.sparse import model as model_module
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")


@pytest.fixture(autouse=True)
def _quick(kernels, monkeypatch: pytest.MonkeyPatch):
    """What is chosen is left to chance here: one short timing each."""
    monkeypatch.setattr(timing, "BUDGET", 0.0)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch):
    """Every layer that the kernels can run is theirs."""
    monkeypatch.setattr(
        model_module, "choose", lambda graph, *_: {n.name: Choice("sparse", 3, 2, 2) for n in graph.layers()}
    )


def prune(model: nn.Module, density: float = 0.2) -> nn.Module:
    """Random zeros, norms with statistics, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Conv1d):
            module.weight.data *= torch.rand_like(module.weight) < density
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.1, 2)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
    return model.eval()


def same(model: nn.Module, compiled: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double()).float()
    torch.testing.assert_close(compiled(x.clone()), want, rtol=1e-4, atol=1e-4 * max(1.0, float(want.abs().max())))


NETWORKS = {
    "resnet20": (lambda: build_network("resnet20"), (2, 3, 32, 32)),
    "resnet50": (lambda: ResNet(Bottleneck, (1, 2, 1, 1), 10, width=8), (1, 3, 64, 64)),
    "mobilenetv1": (lambda: build_network("mobilenetv1:0.25", num_classes=10), (1, 3, 64, 64)),
    "linear": (lambda: nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 4)), (7, 20)),
}


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_by_the_kernels(name: str):
    make, shape = NETWORKS[name]
    model, x = prune(make()), torch.randn(shape)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    same(model, compiled, torch.randn(shape))
    same(model, compiled, torch.randn(3, *shape[1:]))
    if len(shape) == 4:
        same(model, compiled, torch.randn(1, 3, 39, 50))
    kinds = {task.kind for task in compiled._plan(x).tasks if task.node.name not in ("images", "input_1")}
    assert kinds <= {"window", "copy", "mean", "linear", "torch"}
    assert len(compiled.graph.layers()) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())


def test_a_network_chosen_by_time(tmp_path: Path):
    model, x = prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    table = compiled.table().splitlines()
    assert table[0].split() == ["layer", "nonzero", "executed", "dense", "ms", "chosen", "ms"]
    assert [line.split()[0] for line in table[1:]] == [n.label for n in compiled.graph.layers()]
    assert str(compiled) == compiled.table()
    for choice in compiled.choices.values():
        assert choice.ms <= choice.ms_dense
    rows = compiled.profile(x)
    assert {label for label, _, _ in rows} >= {n.label for n in compiled.graph.layers()}
    assert all(ms >= 0 for _, _, ms in rows)


def test_thresholded_layers_are_densified_in_a_copy():
    model = sparsify(build_network("resnet-digits", num_classes=10, in_channels=1), initial_threshold=0.05).eval()
    x = torch.randn(2, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    compiled = deploy.compile_sparse(model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any("STR" in type(module).__name__ for module in model.modules())


class Odd(nn.Module):
    """What lies between layers in the wild: in-place sums, gates, views, broadcast sums, a shared layer."""

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
    assert compiled.left == {"reflect": "padding_mode='reflect'"}
    assert "reflect  " in compiled.table()
    with pytest.raises(ValueError, match="reflect calls Conv2d, which a file cannot hold"):
        compiled.save(tmp_path / "odd")
    assert list(tmp_path.iterdir()) == []


class Untraceable(nn.Module):
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


def test_what_cannot_be_traced_is_compiled_layer_by_layer(tmp_path: Path):
    model, x = prune(Untraceable()), torch.randn(2, 3, 13, 14)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    same(model, compiled, torch.randn(1, 3, 9, 30))
    assert isinstance(model.conv, nn.Conv2d)
    lines = [line.split()[0] for line in str(compiled).splitlines()]
    assert lines == ["layer", "conv", "head", "narrow"]
    with pytest.raises(ValueError, match="Untraceable could not be traced"):
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


def test_what_is_changed_through_a_view_is_not_traced(by_kernels):
    model, x = ThroughAView().eval(), torch.randn(1, 3, 9, 9)
    same(model, deploy.compile_sparse(model, x), x)


def test_hooks_stay(by_kernels):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(1, 3, 9, 9)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    assert compiled.left == {"0": "it has forward hooks"}


def test_masks_of_torch_prune():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 9, 9)
    torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="become part of the weights by its `remove`"):
        deploy.compile_sparse(model, x)
    torch.nn.utils.prune.remove(model[0], "weight")
    same(model.eval(), deploy.compile_sparse(model, x), x)


def test_few_plans_are_kept(by_kernels):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    compiled = deploy.compile_sparse(model, torch.randn(1, 3, 9, 9))
    for size in range(5, 30):
        same(model, compiled, torch.randn(1, 3, size, size))
    assert len(compiled._plans) == model_module.PLANS


def test_no_images(by_kernels):
    model = prune(build_network("resnet-digits", num_classes=10, in_channels=1))
    assert deploy.compile_sparse(model, torch.randn(1, 1, 8, 8))(torch.randn(0, 1, 8, 8)).shape == (0, 10)


def test_bare_layers_and_pointwise_linear():
    for model, shape in (
        (nn.Conv2d(4, 6, 3), (1, 4, 8, 8)),
        (nn.Linear(6, 3), (2, 5, 6)),
        (nn.Conv2d(4, 6, 3), (4, 8, 8)),
    ):
        same(model.eval(), deploy.compile_sparse(model, torch.randn(shape)), torch.randn(shape))


def test_saved_and_loaded(tmp_path: Path, by_kernels):
    model, x = prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)
    compiled = deploy.compile_sparse(model, x)
    compiled.save(tmp_path / "net.str")
    loaded = deploy.load_sparse(tmp_path / "net.str")
    assert torch.equal(loaded(x), compiled(x))
    assert loaded.choices == compiled.choices
    assert str(loaded) == str(compiled)
    assert (tmp_path / "net.str").stat().st_size < 0.5 * 4 * sum(p.numel() for p in model.parameters())
    assert torch.equal(copy.deepcopy(compiled)(x), compiled(x))


def test_files_that_hold_no_network(tmp_path: Path, by_kernels):
    deploy.pack({"a": torch.zeros(100)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds no compiled network: compile_sparse\(...\).save"):
        deploy.load_sparse(tmp_path / "other")
    for record, message in (
        ({"format": "str_triton.sparse", "version": 7}, "version 7 of compiled networks, this is for version 1"),
        (_record([{"kind": "Call", "name": "a", "inputs": [], "target": "os.system"}]), "describes no network"),
        (_record([{"kind": "Norm", "name": "a", "inputs": []}]), "describes no network"),
    ):
        deploy.pack({"a": torch.zeros(100)}, tmp_path / "other", metadata={"sparse": record})
        with pytest.raises(ValueError, match=message):
            deploy.load_sparse(tmp_path / "other")
    deploy.compile_sparse(prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)).save(tmp_path / "net")
    data = bytearray((tmp_path / "net").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "net").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        deploy.load_sparse(tmp_path / "net")


def _record(nodes: list) -> dict:
    return {"format": "str_triton.sparse", "version": 1, "nodes": nodes, "output": None, "choices": {}, "left": {}}


def test_bad_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="takes one tensor, got list"):
        deploy.compile_sparse(model, [1.0])
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch.float64"):
        deploy.compile_sparse(model, torch.randn(1, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"Sequential does not take an example of shape \(1, 5, 8, 8\)"):
        deploy.compile_sparse(model, torch.randn(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"0.weight is torch.float16 on cpu: model.float"):
        deploy.compile_sparse(copy.deepcopy(model).half(), torch.randn(1, 3, 8, 8))
    compiled = deploy.compile_sparse(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch\.int64"):
        compiled(torch.ones(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="is for inference"):
        compiled.train()
    assert not compiled.eval().training


@pytest.fixture
def no_library():
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def test_without_a_compiler_torch_runs_all_and_says_so_once(no_library, tmp_path, monkeypatch, by_kernels):
    model, x = prune(build_network("resnet-digits", num_classes=10, in_channels=1)), torch.randn(1, 1, 8, 8)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match=r"by torch alone.*no C compiler was found \(\$CC, cc, gcc, clang\)"):
        compiled = deploy.compile_sparse(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(model, compiled, x)
        same(model, deploy.compile_sparse(model, x), x)


def test_without_a_compiler_layers_are_timed(no_library, tmp_path, monkeypatch):
    model, x = prune(build_network("resnet-digits", num_classes=10, in_channels=1)), torch.randn(1, 1, 8, 8)
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="the C compiler 'false' does not run"):
        compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    assert {choice.execution for choice in compiled.choices.values()} <= {"dense", "channels_last", "csr"}


@pytest.mark.parametrize("execution", ["dense", "channels_last", "csr"])
def test_executions_by_torch(monkeypatch, execution):
    monkeypatch.setattr(model_module, "choose", lambda graph, *_: {n.name: Choice(execution) for n in graph.layers()})
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(1), nn.Linear(8 * 30, 7))
    x = torch.randn(2, 3, 5, 6)
    same(prune(model, 0.3), deploy.compile_sparse(model, x), x)


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(tmp_path, monkeypatch):
    failing = script(tmp_path / "cc", '[ "$1" = --version ] && exit 0\necho "kernels.c:1: no such luck" >&2\nexit 1\n')
    monkeypatch.setenv("CC", failing)
    with pytest.raises(build.BuildError, match=r"fails on kernels\.c: kernels\.c:1: no such luck"):
        build.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_library_is_compiled_once_per_compiler_and_flags(tmp_path, monkeypatch):
    flags = (("-O0", "-std=gnu11", "-fPIC", "-shared"),)
    path = build.build(tmp_path, flags)
    before = path.stat().st_mtime_ns
    assert build.build(tmp_path, flags) == path
    assert path.stat().st_mtime_ns == before
    assert build.build(tmp_path, ((*flags[0], "-DOTHER"),)) != path
    assert len(list(tmp_path.iterdir())) == 2
    refused = build.build(tmp_path / "b", (("--no-such-flag",), *flags))
    assert build.load(refused).str_triton_lanes() in (4, 8, 16)


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(build.BuildError, match="cannot hold the compiled kernels"):
        build.build(tmp_path / "file" / "cache")


def test_buffers_are_reused(by_kernels):
    model, x = prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)
    plan: Plan = deploy.compile_sparse(model, x)._plan(x)
    buffers = plan._operations.buffers
    assert len(buffers._all) < len(buffers._places) / 2
