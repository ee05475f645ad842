"""The pruning methods on tiny nets: exact counts, what each does to weights, gradients and momentum, and resuming."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from str_triton import count
from str_triton.cnn.config import METHODS, TAKEN_BY, Config
from str_triton.cnn.methods import MASKED, prepare
from str_triton.cnn.methods.budget_file import layer_sparsities
from str_triton.cnn.methods.dnw import DNW
from str_triton.cnn.methods.gmp import GMP
from str_triton.cnn.methods.keep_zeros import KeepZeros
from str_triton.cnn.methods.rigl import RigL
from str_triton.cnn.models import build
from str_triton.cnn.recipes import digits, resolve
from tests.messages import holding
from tests.runs import same_bits

IMAGE = torch.zeros(1, 1, 6, 6)
WAYS = [(method, way) for method in MASKED for way in METHODS[method]]


def net(seed: int = 0) -> nn.Module:
    """Two convolutions and a linear layer: 72, 1152 and 64 weights."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def configure(method: str, **options) -> Config:
    return resolve(replace(digits(), method=method, **options))


def train(model: nn.Module, controller, optimizer, first: int, last: int, total: int) -> None:
    """Steps ``first`` to ``last`` of ``total``; the data follow from the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(32, 1, 6, 6, generator=generator)
        labels = torch.randint(0, 4, (32,), generator=generator)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step((step + 1) / total)


def begin(method: str, seed: int = 0, **options):
    model = net(seed)
    controller = prepare(configure(method, **options), model, IMAGE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    if hasattr(controller, "attach"):
        controller.attach(optimizer)
    return model, controller, optimizer


def zeros(model: nn.Module) -> dict[str, int]:
    return {row.name: row.params - row.nonzeros for row in count(model, IMAGE).rows if row.params}


# Exact counts.


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize(("method", "way"), WAYS)
def test_the_target_is_met_to_the_weight(method: str, way: str, sparsity: float):
    model, controller, optimizer = begin(method, distribution=way, target_sparsity=sparsity, mask_interval=None)
    train(model, controller, optimizer, 0, 12, 12)
    assert count(model, IMAGE).nonzeros == 1288 - round(sparsity * 1288)
    assert min(row.nonzeros for row in count(model, IMAGE).rows if row.params) >= 1


@pytest.mark.parametrize("method", ["str-exact", *MASKED])
def test_a_budget_gives_each_layer_its_share(method: str, tmp_path):
    (tmp_path / "budget.csv").write_text("layer,sparsity\n0,12.5\n3,93.333\n7,50\n")
    model, controller, optimizer = begin(method, budget=str(tmp_path / "budget.csv"))
    train(model, controller, optimizer, 0, 12, 12)
    assert zeros(model) == {"0": 9, "3": 1075, "7": 32}


def test_a_published_point_is_a_budget():
    with torch.device("meta"):
        weights = {n.removesuffix(".weight"): p for n, p in build("resnet50").named_parameters() if p.dim() > 1}
    shares = layer_sparsities("resnet50-str-90.23", weights)
    assert list(shares) == list(weights)
    assert shares["conv1"] == pytest.approx(0.598)
    nonzeros = sum((1 - shares[name]) * weight.numel() for name, weight in weights.items())
    assert 1 - nonzeros / 25_502_912 == pytest.approx(0.9023, abs=1e-4)
    with pytest.raises(ValueError, match=holding("mobilenetv1 .. 75")):
        layer_sparsities("mobilenetv1-str-75.28", weights)


@pytest.mark.parametrize("method", MASKED)
def test_a_target_that_leaves_a_layer_nothing_is_refused(method: str):
    message = r"2 of 1,288 weights .* 3 layers"
    with pytest.raises(ValueError, match=message):
        prepare(configure(method, target_sparsity=0.9985), net(), IMAGE)


@pytest.mark.parametrize(("method", "way"), WAYS)
def test_the_schedules_sparsity_is_the_counted_one(method: str, way: str):
    model, controller, optimizer = begin(method, distribution=way, target_sparsity=0.9, mask_interval=None)
    for first, last in ((0, 1), (1, 12)):
        train(model, controller, optimizer, first, last, 12)
        assert controller.scheduled() == {"sparsity": pytest.approx(count(model, IMAGE).sparsity, abs=2 / 1288)}
    resumed = begin(method, distribution=way, target_sparsity=0.9, mask_interval=None)[1]
    resumed.load_state_dict(controller.state_dict())
    assert resumed.scheduled() == controller.scheduled()


def test_the_zeros_that_are_kept_are_counted_once_and_after_resuming():
    weight = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 2.0, 3.0]))
    controller, resumed = KeepZeros({"w": weight}), KeepZeros({"w": nn.Parameter(torch.ones(5))})
    assert controller.scheduled() == {"sparsity": pytest.approx(0.4)}
    resumed.load_state_dict(controller.state_dict())
    assert resumed.scheduled() == {"sparsity": pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("gradient", "shares"),
    [(None, [1, 0]), ("masked", [0, 0]), ("straight_through", [1, 1]), ("switched", [1, 0])],
)
def test_the_gradient_that_is_named_trains_pruned_weights(gradient: str | None, shares: list[int]):
    """The share of the steps that train pruned weights, in the first half of training and in the second."""
    model = net()
    controller = prepare(configure("str-exact", gradient=gradient), model, IMAGE)
    trained = []
    for step in range(10):
        trained.append(model[0].gradient == "straight_through")
        controller.step((step + 1) / 10)
    assert [sum(half) / 5 for half in (trained[:5], trained[5:])] == shares


# GMP.


def test_gmp_keeps_the_largest_on_a_cubic_schedule():
    weight = nn.Parameter(torch.tensor([0.1, -0.9, 0.3, -0.4, 0.5, -0.6, 0.7, 0.8]))
    controller = GMP({"w": weight}, [2], interval=1)
    controller.step(0.35)  # 1 - 0.5 ** 3 of the way: 5.25 of 6
    assert weight.detach().tolist() == pytest.approx([0, -0.9, 0, 0, 0, 0, 0.7, 0.8])
    with torch.no_grad():
        weight[[0, 2]] = 99.0  # what is pruned stays so, whatever the optimizer does to it
    controller.step(0.7)
    assert weight.nonzero().flatten().tolist() == [1, 7]
    controller.step(1.0)
    assert int(weight.count_nonzero()) == 2


def test_gmp_prunes_at_intervals_and_when_the_schedule_ends():
    weight = nn.Parameter(torch.linspace(0.1, 1, 100))
    controller = GMP({"w": weight}, [10], interval=4)
    left = []
    for step in range(10):
        controller.step((step + 1) / 10)
        left.append(int(weight.count_nonzero()))
    cubic = [100 - round(90 * (1 - (1 - p / 7) ** 3)) for p in (1, 5)]
    assert left == [cubic[0]] * 4 + [cubic[1]] * 2 + [10] * 4


def test_global_gmp_takes_the_smallest_anywhere_but_leaves_each_layer_its_floor():
    weights = {"large": nn.Parameter(torch.linspace(1, 2, 40)), "small": nn.Parameter(torch.linspace(0.01, 0.02, 40))}
    GMP(weights, [3, 3], interval=10, total=20).step(1.0)
    left = {name: weight.nonzero().flatten().tolist() for name, weight in weights.items()}
    assert left == {"large": list(range(23, 40)), "small": [37, 38, 39]}


# DNW.


def test_dnw_is_the_literal_straight_through_estimator():
    """Beside SGD on dense weights whose forward is masked, with the gradient passed on as it is."""
    sparse = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)))
    dense = nn.Parameter(sparse.detach().clone())
    ours = torch.optim.SGD([sparse], lr=0.3, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD([dense], lr=0.3, momentum=0.9, weight_decay=0.01)
    DNW({"w": sparse}, [7]).attach(ours)
    supports = set()
    for step in range(30):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        cut = dense.detach().abs().flatten().sort(descending=True).values[6]
        masked = dense.detach() * (dense.detach().abs() >= cut)
        assert torch.equal(sparse, masked)
        supports.add(tuple(masked.flatten().nonzero().flatten().tolist()))
        F.linear(x, sparse).square().sum().backward()
        F.linear(x, dense + (masked - dense).detach()).square().sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert len(supports) > 1  # else the zeros never came into play


def test_dnw_keeps_its_dense_weights_when_a_step_is_skipped():
    """As a gradient scaler does: neither hook runs, and the dense weights are not taken from the sparse ones."""
    model, controller, optimizer = begin("dnw")
    before = [weight.clone() for weight in controller.dense]
    controller.step(0.1)
    train(model, controller, optimizer, 0, 1, 10)
    moved = [(now - then).abs().max() for now, then in zip(controller.dense, before, strict=True)]
    assert all(0 < float(change) < 0.2 for change in moved)
    assert all(int((dense == 0).sum()) == 0 for dense in controller.dense)


# RigL.


def rigl() -> tuple[nn.Parameter, RigL, torch.optim.SGD]:
    """Ten weights of which five are connected, before the update that comes with the second step."""
    weight = nn.Parameter(torch.ones(10))
    controller = RigL({"w": weight}, [5], interval=1)
    controller.masks[0].copy_(torch.arange(10) < 5)
    with torch.no_grad():
        weight.copy_(torch.tensor([0.1, 0.5, -0.2, 0.9, 0.8, 0, 0, 0, 0, 0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    controller.attach(optimizer)
    controller.steps = 1
    return weight, controller, optimizer


@pytest.mark.parametrize(("progress", "number"), [(0.0, 30), (0.3, 19), (0.5, 7), (0.74, 0), (0.9, 0)])
def test_rigl_drops_and_grows_as_many_by_a_cosine(progress: float, number: int):
    """int(100 * 0.3 / 2 * (1 + cos(pi * progress / 0.75))): of 30, 19.6, 7.5, 0.01; none after the end."""
    weight = nn.Parameter(torch.linspace(1, 2, 200))
    controller = RigL({"w": weight}, [100], interval=1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    controller.attach(optimizer)
    controller.progress, controller.steps = progress, 1
    before, values = controller.masks[0].clone(), weight.detach().clone()
    weight.grad = (~before).float() * torch.linspace(1, 2, 200)
    optimizer.step()
    after = controller.masks[0]
    gone, new = (before & ~after).nonzero().flatten(), (after & ~before).nonzero().flatten()
    assert torch.equal(gone, before.nonzero().flatten()[:number])  # the smallest
    assert torch.equal(new, (~before).nonzero().flatten()[100 - number :])  # the steepest
    assert not weight[gone].any()
    assert not weight[new].any()
    assert torch.equal(weight[before & after], values[before & after])


def test_rigl_steps_on_after_its_last_update():
    weight, controller, optimizer = rigl()
    controller.progress = 0.75
    weight.grad = torch.ones(10)
    optimizer.step()
    assert weight.detach().tolist() == pytest.approx([0.0, 0.4, -0.3, 0.8, 0.7, 0, 0, 0, 0, 0], abs=1e-6)


def test_rigl_update_by_hand():
    """One of five connections is dropped (0.1, the smallest) and the steepest of the zeros grows (-7)."""
    weight, controller, optimizer = rigl()
    optimizer.state[weight]["momentum_buffer"] = torch.ones(10)
    weight.grad = torch.tensor([1.0, 9, 9, 9, 9, 2, 0, -7, 3, 0])
    optimizer.step()
    assert controller.masks[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 7]
    assert weight.detach().tolist() == pytest.approx([0, 0.5, -0.2, 0.9, 0.8, 0, 0, 0, 0, 0])  # no gradient step
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    controller.steps, controller.interval = 2, 3  # a step without an update
    weight.grad = torch.ones(10)
    optimizer.step()
    moved = [0.5 - 0.19, -0.2 - 0.19, 0.9 - 0.19, 0.8 - 0.19]
    assert weight.detach().tolist() == pytest.approx([0, *moved, 0, 0, -0.1, 0, 0])


def test_rigl_lets_a_dropped_connection_that_grows_again_keep_its_value():
    weight, controller, optimizer = rigl()
    optimizer.state[weight]["momentum_buffer"] = torch.ones(10)
    weight.grad = torch.tensor([8.0, 0, 0, 0, 0, 2, 0, -7, 3, 0])
    optimizer.step()
    assert controller.masks[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert weight[0].item() == pytest.approx(0.1)
    assert float(optimizer.state[weight]["momentum_buffer"][0]) == 1


def test_rigl_starts_as_the_seed_says_and_masks_momentum():
    model, controller, optimizer = begin("rigl", target_sparsity=0.9, mask_interval=4)
    first = [mask.clone() for mask in controller.masks]
    assert same_bits(first, begin("rigl", target_sparsity=0.9)[1].masks)
    assert not same_bits(first, begin("rigl", seed=1, target_sparsity=0.9)[1].masks)
    changed = []
    for step in range(20):
        before = [mask.clone() for mask in controller.masks]
        train(model, controller, optimizer, step, step + 1, 20)
        changed.append(not same_bits(before, controller.masks))
        for weight, mask, keep in zip(controller.weights, controller.masks, controller.keep, strict=True):
            assert int(mask.sum()) == keep
            assert not weight[~mask].any()
            assert not optimizer.state[weight]["momentum_buffer"][~mask].any()
    assert [step for step in range(20) if changed[step]] == [4, 8, 12]  # until 0.75, never before the first interval


# Resuming.


@pytest.mark.parametrize(("method", "way"), WAYS)
@pytest.mark.parametrize("stop", [3, 9])
def test_a_resumed_run_ends_in_the_same_bits(method: str, way: str, stop: int):
    interval = {"mask_interval": 2} if method in TAKEN_BY["mask_interval"] else {}
    options = {"distribution": way, "target_sparsity": 0.8} | interval
    whole = begin(method, **options)
    train(*whole, 0, 12, 12)
    model, controller, optimizer = begin(method, **options)
    train(model, controller, optimizer, 0, stop, 12)
    with controller.exact():
        state = copy.deepcopy([part.state_dict() for part in (model, controller, optimizer)])
    train(model, controller, optimizer, stop, 12, 12)  # what has been taken is the state's own
    resumed = begin(method, seed=5, **options)
    for part, saved in zip(resumed, state, strict=True):
        part.load_state_dict(saved)
    train(*resumed, stop, 12, 12)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert same_bits(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("method", ["str-exact", *MASKED])
def test_a_budget_that_has_changed_is_noticed(method: str, tmp_path):
    file = tmp_path / "budget.json"
    file.write_text('{"0": 50, "3": 90, "7": 50}')
    state = begin(method, budget=str(file))[1].state_dict()
    file.write_text('{"0": 50, "3": 91, "7": 50}')
    with pytest.raises(ValueError, match="another target by layer"):
        begin(method, budget=str(file))[1].load_state_dict(state)
