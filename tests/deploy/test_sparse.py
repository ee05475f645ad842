"""compile_sparse: whole networks give what torch gives, however their layers are executed."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from str_triton import deploy, sparsify
from str_triton.cnn.models import build as build_network
from str_triton.cnn.resnet import Bottleneck, ResNet
from str_triton.deploy.sparse import compile as compilation
from str_triton.deploy.sparse import model as model_module
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.nn import Control
from tests.deploy.sparse_networks import prune, same
from tests.messages import holding

pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


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
    kinds = {task.kind for task in compiled._plan([x]).tasks if task.node.name not in ("images", "input_1")}
    assert kinds <= {"window", "copy", "mean", "reshape", "linear", "torch"}
    assert len(compiled.graph.layers()) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())


def test_a_network_chosen_by_time(tmp_path: Path):
    model, x = prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)
    compiled = deploy.compile_sparse(model, x)
    same(model, compiled, x)
    table = compiled.table().splitlines()
    assert table[0].split() == ["layer", "sparsity", "executed", "dense", "ms", "chosen", "ms"]
    assert [line.split()[0] for line in table[1:]] == [n.label for n in compiled.graph.layers()]
    assert str(compiled) == compiled.table()
    for choice in compiled.choices.values():
        assert choice.ms > 0
        assert choice.ms_dense > 0
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


def test_a_model_whose_controller_is_not_done_is_compiled_with_a_warning(by_kernels):
    model = sparsify(nn.Sequential(nn.Linear(30, 20))).eval()
    model[0].control = Control(status="at 0.5")
    with pytest.warns(UserWarning, match=r"at 0\.5.*finish") as caught:
        deploy.compile_sparse(model, torch.randn(1, 30))
    assert [w.filename for w in caught if "finish" in str(w.message)] == [__file__]


def test_a_dense_weight_that_the_forward_reads_is_named(by_kernels):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(20, 8)

        def forward(self, x):
            return nn.functional.linear(self.encoder(x), self.encoder.weight.T)

    with pytest.warns(UserWarning, match="reads the dense weight of encoder") as caught:
        deploy.compile_sparse(sparsify(Tied()), torch.randn(1, 20))
    assert [w.filename for w in caught if "dense weight" in str(w.message)] == [__file__]


def test_few_plans_are_kept(by_kernels):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    compiled = deploy.compile_sparse(model, torch.randn(1, 3, 9, 9))
    for size in range(5, 30):
        same(model, compiled, torch.randn(1, 3, size, size))
    assert len(compiled._plans) == model_module.PLANS


def test_no_images(by_kernels):
    model = prune(build_network("resnet-digits", num_classes=10, in_channels=1))
    assert deploy.compile_sparse(model, torch.randn(1, 1, 8, 8))(torch.randn(0, 1, 8, 8)).shape == (0, 10)


@pytest.mark.parametrize("execution", ["dense", "channels_last", "csr"])
def test_executions_by_torch(chosen, execution):
    chosen(Choice(execution))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(1), nn.Linear(8 * 30, 7))
    x = torch.randn(2, 3, 5, 6)
    same(prune(model, 0.3), deploy.compile_sparse(model, x), x)


def test_buffers_are_reused(by_kernels):
    model, x = prune(build_network("resnet20")), torch.randn(1, 3, 32, 32)
    plan: Plan = deploy.compile_sparse(model, x)._plan([x])
    buffers = plan.buffers
    assert len(buffers._all) < len(buffers._places) / 2


def test_bad_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="takes a module, got dict"):
        deploy.compile_sparse({}, torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=holding("Bilinear .. (1, 3)")):
        deploy.compile_sparse(nn.Bilinear(3, 3, 3), torch.randn(1, 3))
    with pytest.raises(TypeError, match="takes one tensor, got float"):
        deploy.compile_sparse(model, 1.0)
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch.float64"):
        deploy.compile_sparse(model, torch.randn(1, 3, 8, 8).double())
    with pytest.raises(ValueError, match=holding("Sequential .. (1, 5, 8, 8)")):
        deploy.compile_sparse(model, torch.randn(1, 5, 8, 8))
    with pytest.raises(ValueError, match=holding("0.weight .. torch.float16 .. cpu .. model.float")):
        deploy.compile_sparse(copy.deepcopy(model).half(), torch.randn(1, 3, 8, 8))
    compiled = deploy.compile_sparse(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch\.int64"):
        compiled(torch.ones(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="is for inference"):
        compiled.train()
    assert not compiled.eval().training


def test_threads_that_compile_take_turns(monkeypatch: pytest.MonkeyPatch):
    """Two exports at a time fail, or one records operations of the other."""
    running = [0, 0]  # now, and at most

    def count(*_: object) -> None:
        running[0] += 1
        running[1] = max(running)
        time.sleep(0.05)
        running[0] -= 1

    monkeypatch.setattr(compilation, "_compile", count)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda model: deploy.compile_sparse(model, torch.randn(2, 3)), [nn.Linear(3, 4)] * 3))
    assert running == [0, 1]
