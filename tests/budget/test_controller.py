"""The controller: exact targets, schedules, floors, and a training that evaluation does not disturb."""

import copy
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from str_triton import RankTarget, SparsityController, Target, count, densify, parameter_groups, sparsify
from str_triton.nn import STRLinear, str_layers
from tests.messages import holding


def convolutional_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


IMAGES = torch.zeros(2, 3, 24, 24)


def weights_share(budget):
    return max(1 / budget.params, 1e-4)


@pytest.mark.parametrize("granularity", ["layer", "filter", "weight", "global"])
@pytest.mark.parametrize("g", ["exp", "sigmoid", "softplus"])
@pytest.mark.parametrize("target", [{"sparsity": 0.9}, {"sparsity": 0.37}, {"nonzeros": 1234}, {"flops": 300_000}])
def test_the_target_holds_at_the_end(granularity, g, target):
    model = sparsify(convolutional_net(), granularity=granularity, g=g)
    floor = 0.0 if granularity == "global" else 0.5
    controller = SparsityController(model, Target(**target), example_input=IMAGES, floor=floor)
    controller.step(1.0)
    budget = count(model, IMAGES)
    if "sparsity" in target:
        assert abs(budget.sparsity - target["sparsity"]) <= 1 / budget.params
    elif "nonzeros" in target:
        assert abs(budget.nonzeros - target["nonzeros"]) <= 1
    else:
        largest = max(row.dense_flops // row.params for row in budget.rows if row.params)
        assert abs(budget.flops - target["flops"]) <= largest


def test_learned_thresholds_are_the_distribution():
    """One offset moves all: the ratios of the thresholds (g = exp) stay what they were."""
    model = sparsify(convolutional_net(), g="exp")
    layers = list(str_layers(model).values())
    with torch.no_grad():
        for factor, layer in enumerate(layers, 1):
            layer.raw_threshold.fill_(0.3 * factor)
    SparsityController(model, Target(sparsity=0.8), floor=0).step(1.0)
    logs = torch.cat([layer.raw_threshold.detach() for layer in layers])
    torch.testing.assert_close(logs.diff(), torch.full((3,), 0.3), rtol=0, atol=1e-6)


def test_excluded_layers_count_as_dense():
    model = sparsify(convolutional_net(), exclude="0")
    SparsityController(model, Target(sparsity=0.9)).step(1.0)
    budget = count(model, IMAGES)
    assert budget.rows[0].sparsity == 0
    assert abs(budget.sparsity - 0.9) <= 1 / budget.params


def test_zeros_without_a_threshold_count_too():
    model = convolutional_net()
    with torch.no_grad():
        model[0].weight[:4] = 0
    sparsify(model, exclude="0")
    SparsityController(model, Target(nonzeros=2000)).step(1.0)
    assert abs(count(model, IMAGES).nonzeros - 2000) <= 1


def test_weights_that_are_tied_after_sparsify_are_refused():
    model = sparsify(nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)))
    model[1].weight = model[0].weight
    ids = torch.arange(6).view(2, 3)
    assert count(model, ids).params == 800  # The thresholds are still equal.
    with pytest.raises(ValueError, match=r"'0' and '1' share a weight, but each has a threshold of its own"):
        SparsityController(model, Target(sparsity=0.8))
    with torch.no_grad():
        model[0].raw_threshold.add_(1)
    with pytest.raises(ValueError, match="tie weights before sparsify"):
        count(model, ids)
    model[1].raw_threshold = model[0].raw_threshold
    SparsityController(model, Target(sparsity=0.8)).finish()
    assert count(model, ids).nonzeros == 160
    dense = densify(model)
    assert dense[0].weight is dense[1].weight


def test_tied_weights_count_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    model[2].weight = model[0].weight
    sparsify(model)
    SparsityController(model, Target(nonzeros=100)).step(1.0)
    assert count(model, torch.zeros(1, 20)).nonzeros == 100


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cubic", 0.8 * (1 - 0.5**3)), ("linear", 0.8 * 0.5), ("constant", 0.8)],
)
def test_schedules(schedule, expected):
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.8), schedule=schedule, begin=0.2, end=0.6)
    for progress, sparsity in [(0.0, 0.0), (0.1, 0.0), (0.4, expected), (0.6, 0.8), (0.9, 0.8)]:
        controller.progress = progress
        controller.solve()
        assert abs(count(model, IMAGES).sparsity - sparsity) <= weights_share(count(model, IMAGES))


def test_the_interval_decides_when_to_solve(monkeypatch):
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.8), interval=4, end=1.0)
    solved = []
    shifts = controller._shifts
    monkeypatch.setattr(controller, "_shifts", lambda done: solved.append(controller.progress) or shifts(done))
    for i in range(9):
        controller.step((i + 1) / 10)
    assert solved == [0.1, 0.1, 0.5, 0.9]  # at the first step for now and for the next solve


@pytest.mark.parametrize(("progress", "solves"), [(0.25, 2), (0.26, 1)])
def test_the_pace_of_training_is_known_from_a_first_step_within_an_interval(progress, solves, monkeypatch):
    """One solve for now, and one for the next solve. A controller that comes later does not know the pace."""
    controller = SparsityController(sparsify(nn.Linear(9, 9)), Target(sparsity=0.8), interval=4, end=1.0)
    solved, shifts = [], controller._shifts
    monkeypatch.setattr(controller, "_shifts", lambda done: solved.append(done) or shifts(done))
    controller.step(progress)
    assert len(solved) == solves


def test_between_solves_the_thresholds_follow_the_schedule():
    """Nothing else moves the weights here: at every step the count is near the schedule's value."""
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.8), interval=10, end=1.0, schedule="linear")
    for i in range(60):
        controller.step((i + 1) / 100)
        if i >= 10:
            assert abs(count(model, IMAGES).sparsity - 0.8 * (i + 1) / 100) < 0.01


@pytest.mark.parametrize(
    "progress",
    [
        lambda step: step // 50 / 4,  # epochs
        lambda step: 0.4 + step / 500,  # a controller that comes late
        lambda step: 0.004 * min(step, 40) + 0.0004 * max(0, step - 40),  # slows down
    ],
)
def test_uneven_progress_leads_past_the_schedule_by_no_more_than_an_interval(progress):
    model = sparsify(nn.Linear(50, 50))
    controller = SparsityController(model, Target(sparsity=0.9), end=1.0, schedule="linear", interval=20)
    gaps = []
    for step in range(120):
        controller.step(progress(step))
        gaps.append(float((model.sparse_weight == 0).float().mean()) - 0.9 * progress(step))
    assert max(gaps) < 0.1
    assert abs(gaps[-1]) < 0.1


def deep_net():
    torch.manual_seed(1)
    layers = [nn.Linear(64, 64)]
    for i in range(20):
        layer = nn.Linear(64, 64, bias=False)
        nn.init.normal_(layer.weight, std=0.5 ** (i / 2))  # the last ones would be emptied by a global threshold
        layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("at", [3, 10, 20, 21, 29])
def test_a_state_dict_between_solves_does_not_lead_past_the_schedule(at):
    """It moves the thresholds to where the schedule is: what is left of the way to the next solve is shorter."""
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.9), schedule="linear", end=1.0, interval=20)
    for step in range(1, 40):
        controller.step(step / 40)
        if step == at:
            controller.state_dict()
        if step in (1, 21, at):
            assert count(model, IMAGES).sparsity == pytest.approx(0.9 * step / 40, abs=0.002)
    assert 0.7 < count(model, IMAGES).sparsity < 0.9


def test_no_layer_is_emptied_at_99_5_percent():
    model = sparsify(deep_net())
    SparsityController(model, Target(sparsity=0.995)).step(1.0)
    budget = count(model, torch.zeros(1, 64))
    assert abs(budget.sparsity - 0.995) <= 1 / budget.params
    # Half of what uniform pruning would leave to a layer: 0.5 * 0.005 * 4096 = 10.
    assert min(row.nonzeros for row in budget.rows) >= 10


def test_without_the_floor_layers_are_emptied():
    """The test above can fail: this is the net for it."""
    model = sparsify(deep_net())
    SparsityController(model, Target(sparsity=0.995), floor=0).step(1.0)
    assert min(row.nonzeros for row in count(model, torch.zeros(1, 64)).rows) == 0


def test_already_sparse_weights_do_not_confuse_the_solve():
    model = convolutional_net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.05)
    before = sum(int(m.weight.count_nonzero()) for m in model if isinstance(m, nn.Conv2d | nn.Linear))
    sparsify(model)
    controller = SparsityController(model, Target(sparsity=0.5))
    controller.step(1.0)  # Fewer are left than asked for: all of them survive.
    assert count(model, IMAGES).nonzeros == before
    assert all(layer.raw_threshold.isfinite().all() for layer in str_layers(model).values())


def test_all_weights_survive_before_the_schedule_begins():
    model = sparsify(convolutional_net(), initial_threshold=0.5)
    SparsityController(model, Target(sparsity=0.9), begin=0.5).step(0.0)
    assert count(model, IMAGES).sparsity == 0


def test_exact_leaves_training_as_it_was():
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.9))
    controller.step(0.3)
    with torch.no_grad():
        for layer in str_layers(model).values():
            layer.dense_weight.mul_(torch.rand_like(layer.dense_weight) + 0.5)  # The survivors drift.
    controller.progress = 1.0
    before = copy.deepcopy(model.state_dict())
    drifted = count(model, IMAGES).sparsity
    with controller.exact():
        exact = count(model, IMAGES)
        with controller.exact():  # A checkpoint within an evaluation.
            inner = controller.state_dict()
        state = controller.state_dict()
    assert abs(drifted - 0.9) > 0.01
    assert abs(exact.sparsity - 0.9) <= 1 / exact.params
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for raws in (state["raw_thresholds"], inner["raw_thresholds"]):
        assert all(
            torch.equal(raw, layer.raw_threshold) for raw, layer in zip(raws, str_layers(model).values(), strict=True)
        )


def test_exact_puts_back_when_evaluation_raises():
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.9))
    before = copy.deepcopy(model.state_dict())
    controller.progress = 1.0
    with pytest.raises(RuntimeError), controller.exact():
        raise RuntimeError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def train(model, controller, optimizer, begin, end, steps=30):
    for i in range(begin, end):
        torch.manual_seed(i)
        loss = model(torch.randn(8, 3, 24, 24)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step((i + 1) / steps)


def make_run(distribution="learned"):
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.95), interval=4, distribution=distribution)
    return model, controller, torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.01, momentum=0.9)


@pytest.mark.parametrize("inside_exact", [True, False])
def test_state_dict_resumes_bit_for_bit(inside_exact):
    """Inside exact() a checkpoint changes nothing; outside, the run that goes on has solved as well."""
    model, controller, optimizer = make_run()
    train(model, controller, optimizer, 0, 14)
    if inside_exact:
        with controller.exact():
            state = copy.deepcopy((model.state_dict(), controller.state_dict(), optimizer.state_dict()))
    else:
        own = controller.state_dict()
        state = copy.deepcopy((model.state_dict(), own, optimizer.state_dict()))
    train(model, controller, optimizer, 14, 30)
    other, other_controller, other_optimizer = make_run()
    other.load_state_dict(state[0])
    other_controller.load_state_dict(state[1])
    other_optimizer.load_state_dict(state[2])
    train(other, other_controller, other_optimizer, 14, 30)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert count(model, IMAGES).sparsity == pytest.approx(0.95, abs=1e-4)


def test_pruned_weights_are_left_to_weight_decay_after_a_while():
    """The gradient follows the progress, in a resumed run too; layers that were masked from the start stay so."""
    model = sparsify(convolutional_net())
    model[0].gradient = "masked"
    controller = SparsityController(model, Target(sparsity=0.95), straight_through_until=0.5)
    seen, states = [], []
    for progress in (0.25, 0.5, 1.0):
        controller.step(progress)
        seen.append([layer.gradient for layer in str_layers(model).values()])
        states.append(copy.deepcopy(controller.state_dict()))
    assert seen == [["masked", *["straight_through"] * 3], *[["masked"] * 4] * 2]
    for state, gradients in zip(states[::-1], seen[::-1], strict=True):
        controller.load_state_dict(state)
        assert [layer.gradient for layer in str_layers(model).values()] == gradients


@pytest.mark.parametrize("until", [0.0, 0.5, 1.0])
def test_the_gradient_of_pruned_weights_stops_where_it_is_told_to(until):
    model = sparsify(nn.Linear(64, 8, bias=False))
    controller = SparsityController(model, Target(sparsity=0.9), end=0.0, straight_through_until=until)
    for progress in (0.4, 0.6):
        controller.step(progress)
        model.zero_grad()
        model(torch.randn(4, 64)).square().sum().backward()
        reaches = (model.weight.grad[model.sparse_weight == 0] != 0).any()
        assert bool(reaches) == (progress < until)


def model_size(model):
    return sum(layer.dense_weight.numel() for layer in str_layers(model).values())


def raw_thresholds(model):
    return torch.cat([layer.raw_threshold.detach() for layer in str_layers(model).values()])


def test_a_fixed_distribution_keeps_its_ratios_and_needs_no_gradients():
    model, controller, optimizer = make_run("fixed")
    train(model, controller, optimizer, 0, 30)
    assert raw_thresholds(model).diff().abs().max() > 0.01  # A floor holds one of them back ...
    controller.target, controller._keep = Target(sparsity=0.5), model_size(model) // 2
    controller.step(1.0)
    assert raw_thresholds(model).diff().abs().max() < 1e-5  # ... and no longer than it must.
    model(IMAGES).square().sum().backward()
    assert all(layer.raw_threshold.grad is None for layer in str_layers(model).values())


@pytest.mark.parametrize("g", ["exp", "sigmoid"])
def test_flop_aware_thresholds_grow_with_the_cost_of_a_weight(g):
    model = sparsify(convolutional_net(), g=g)
    controller = SparsityController(
        model, Target(sparsity=0.8), distribution="flop-aware", example_input=IMAGES, floor=0
    )
    controller.step(1.0)
    budget = count(model, IMAGES)
    thresholds = torch.tensor([row.threshold for row in budget.rows if row.params]).double()
    costs = torch.tensor([row.dense_flops / row.params for row in budget.rows if row.params]).double()
    odds = thresholds if g == "exp" else thresholds / (1 - thresholds)  # What one offset multiplies.
    torch.testing.assert_close(odds / odds[0], (costs / costs[0]) ** 0.2, rtol=1e-3, atol=0)
    assert abs(budget.sparsity - 0.8) <= 1 / budget.params


def test_a_learned_distribution_moves_slowly_within_bounds_and_then_stays():
    model, controller, _ = make_run()
    controller.step(0.0)
    before = raw_thresholds(model)

    def relative():
        raws = raw_thresholds(model)
        return raws - raws.mean()

    def optimizer_moves(step):
        with torch.no_grad():
            for layer, move in zip(str_layers(model).values(), step, strict=True):
                layer.raw_threshold.add_(move)

    optimizer_moves([0.4, -0.4, 0.2, -0.2])
    controller.step(0.1)
    expected = torch.tensor([0.04, -0.04, 0.02, -0.02]) + before - before.mean()
    torch.testing.assert_close(relative(), expected, rtol=0, atol=1e-5)
    for _ in range(200):
        optimizer_moves([1.0, -1.0, 1.0, -1.0])
        controller.solve()  # A solve in between does not count as the optimizer's.
        controller.step(0.2)
    assert relative().abs().max() < 0.8  # Around a mean that moves along, 0.5 at most at each step.
    frozen = relative()
    optimizer_moves([1.0, -1.0, 1.0, -1.0])
    controller.step(0.6)
    torch.testing.assert_close(relative(), frozen, rtol=0, atol=1e-5)


def test_state_dict_solves_first():
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.9))
    controller.progress = 1.0
    controller.state_dict()
    assert abs(count(model, IMAGES).sparsity - 0.9) <= 1 / count(model, IMAGES).params


def test_densified_model_keeps_the_budget():
    model = sparsify(convolutional_net())
    SparsityController(model, Target(sparsity=0.9)).step(1.0)
    budget = count(model, IMAGES)
    assert count(densify(model), IMAGES).nonzeros == budget.nonzeros


def test_controlled_thresholds_do_not_decay():
    model = sparsify(convolutional_net())
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(model, 5e-4)}
    assert decays["thresholds"] == 5e-4
    SparsityController(model, Target(sparsity=0.9), distribution="learned")
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(model, 5e-4)}
    assert decays["thresholds"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("target", [{"sparsity": 0.9}, {"flops": 300_000}])
@pytest.mark.parametrize("distribution", ["fixed", "learned"])
def test_a_step_does_not_wait_for_the_gpu(target, distribution):
    model, images = sparsify(convolutional_net()).cuda(), IMAGES.cuda()
    controller = SparsityController(model, Target(**target), example_input=images, distribution=distribution)
    torch.cuda.set_sync_debug_mode("error")
    try:
        controller.step(0.9)  # Exactness, at 1, waits.
    finally:
        torch.cuda.set_sync_debug_mode("default")
    controller.finish()
    budget = count(model, images)
    assert abs(budget.sparsity - 0.9) <= 1 / budget.params or abs(budget.flops - 300_000) < 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target(sparsity=90), r"got 90: did you mean 0\.9\?"),
        (lambda: Target(flops=0.1), r"flops_share=0\.1"),
        (lambda: Target(flops_share=30), "got 30"),
        (lambda: Target(flops_share=0.0), r"\(0, 1\], got 0\.0"),
        (lambda: Target(sparsity=-0.1), "got -0.1"),
        (lambda: Target(sparsity=1.0), "got 1.0"),
        (lambda: Target(sparsity=float("nan")), "got nan"),
        (lambda: Target(nonzeros=0), "at least 1, got 0"),
        (lambda: Target(flops=-3), "at least 1, got -3"),
        (lambda: Target(), "exactly one"),
        (lambda: Target(sparsity=0.5, flops=3), "exactly one"),
    ],
)
def test_targets_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [Target, RankTarget])
def test_the_keywords_of_all_targets_are_declared_and_documented(kind: type):
    keywords = {target.keyword for target in kind.__subclasses__()}
    assert set(inspect.signature(kind.__init__).parameters) == {"self", *keywords}
    assert set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(kind), re.MULTILINE)) == {*keywords, "ValueError"}
    guide = Path(__file__).parents[2] / "docs" / "guides" / ("budgets.md" if kind is Target else "recurrent.md")
    assert not keywords - set(re.findall(r"`(\w+)[=`]", guide.read_text()))


def test_an_unknown_kind_of_target():
    with pytest.raises(TypeError, match="no kind 'density'; it has sparsity, "):
        Target(density=0.5)


@pytest.mark.parametrize(
    "value", [{"sparsity": "0.9"}, {"nonzeros": "5"}, {"layers": {"0": "0.5"}}, {"flops_share": True}, {"flops": [3]}]
)
def test_a_target_that_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=holding(f"{next(iter(value))} .. number")):
        Target(**value)


@pytest.mark.parametrize("base", [Target, RankTarget])
def test_type_checkers_know_every_keyword(base):
    known = set(inspect.signature(base.__init__).parameters) - {"self"}
    assert known == {kind.keyword for kind in base.__subclasses__()}


def test_targets_of_other_kinds():
    with pytest.raises(TypeError, match="got list"):
        Target(layers=[0.9])
    for endless in (Target(nonzeros=float("inf")), Target(flops=float("inf"))):
        model = sparsify(convolutional_net())
        SparsityController(model, endless, example_input=IMAGES).finish()
        assert count(model, IMAGES).sparsity == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "quadratic"}, "'cubic', 'linear', 'constant', got 'quadratic'"),
        ({"begin": 0.5, "end": 0.2}, "got 0.5 and 0.2"),
        ({"distribution": "free"}, "'flop-aware', 'learned', got 'free'"),
        ({"distribution": "flop-aware"}, "needs example_input"),
        ({"interval": 0}, "at least 1, got 0"),
        ({"floor": 1.5}, r"\[0, 1\], got 1.5"),
        ({"straight_through_until": -0.1}, r"\[0, 1\], got -0.1"),
        ({"target": Target(flops=10**6)}, "needs example_input"),
        ({"target": Target(nonzeros=3)}, "cannot be met"),
        ({"target": Target(flops=20), "example_input": IMAGES}, "cannot be met"),
    ],
)
def test_bad_options(options, message):
    model = sparsify(convolutional_net())
    with pytest.raises(ValueError, match=message):
        SparsityController(model, **({"target": Target(sparsity=0.9)} | options))


def test_a_target_below_what_excluded_layers_allow():
    model = sparsify(convolutional_net(), include="10")
    with pytest.raises(ValueError, match="cannot be met"):
        SparsityController(model, Target(sparsity=0.9))


def test_a_shared_threshold_cannot_keep_a_floor():
    model = sparsify(convolutional_net(), granularity="global")
    with pytest.raises(ValueError, match="floor=0"):
        SparsityController(model, Target(sparsity=0.9))
    with pytest.raises(ValueError, match="distribution='fixed'"):
        SparsityController(model, Target(sparsity=0.9), distribution="flop-aware", example_input=IMAGES, floor=0)


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="sparsify"):
        SparsityController(convolutional_net(), Target(sparsity=0.9))


def test_a_model_without_values_is_refused():
    model = sparsify(convolutional_net()).to("meta")
    with pytest.raises(ValueError, match=r"meta device .*to_empty"):
        SparsityController(model, Target(sparsity=0.9))


@pytest.mark.parametrize("target", [0.9, RankTarget(compression=2)])
def test_a_target_of_another_kind_is_refused(target):
    with pytest.raises(TypeError, match=re.escape(f"Target(sparsity=0.9), got {target!r}")):
        SparsityController(sparsify(convolutional_net()), target)


def test_progress_may_be_a_tensor():
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.9))
    for progress in torch.tensor([0.5, 1.0]):
        controller.step(progress)
    assert count(model, IMAGES).sparsity == pytest.approx(0.9, abs=1e-3)


def test_steps_out_of_range_and_foreign_states_are_refused():
    controller = make_run()[1]
    with pytest.raises(ValueError, match=r"got 1\.5"):
        controller.step(1.5)
    other = SparsityController(sparsify(nn.Sequential(nn.Linear(4, 4))), Target(sparsity=0.5))
    with pytest.raises(ValueError, match="raw thresholds of shapes"):
        controller.load_state_dict(other.state_dict())


@pytest.mark.parametrize("granularity", ["layer", "global"])
def test_a_layer_that_was_replaced_is_noticed(granularity):
    model = sparsify(convolutional_net(), granularity=granularity)
    controller = SparsityController(model, Target(sparsity=0.9), floor=0.0)
    model[-1] = nn.Linear(64, 7)
    controller.step(0.5)
    for use in (controller.finish, lambda: controller.step(1.0), lambda: controller.exact().__enter__()):
        with pytest.raises(ValueError, match=holding("no longer in the model .. new controller")):
            use()


def add_a_layer(model):
    model.append(nn.Linear(model[-1].out_features, 10))


def untie(model):
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())


def adapt(model):
    model[1] = nn.Sequential(model[1], nn.Linear(8, 8))


@pytest.mark.parametrize("change", [add_a_layer, untie, adapt])
def test_weights_that_were_added_are_named_in_a_warning(change):
    """The budget was computed without them; the weights that were there meet it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    controller = SparsityController(sparsify(model), Target(sparsity=0.5))
    controller.step(0.5)
    change(model)
    with pytest.warns(UserWarning, match="were there then"), controller.exact():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.finish()
        assert (model[0].sparse_weight == 0).sum() == 32
        count(model, torch.zeros(1, 8))


def test_a_normalization_that_is_removed_from_an_excluded_layer_is_no_change():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    controller = SparsityController(sparsify(model, exclude="0"), Target(sparsity=0.25))
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.finish()
    assert count(model, torch.zeros(1, 8)).nonzeros == 96


def test_an_excluded_layer_that_was_replaced_counts_as_it_is_now():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[:4] = 0
    controller = SparsityController(sparsify(model, exclude="1"), Target(sparsity=0.4))
    model[1] = nn.Linear(8, 8)
    controller.finish()
    assert count(model, torch.zeros(1, 8)).nonzeros == 77


@pytest.mark.parametrize("change", [add_a_layer, lambda model: model.__setitem__(0, nn.Conv2d(3, 16, 3))])
def test_layers_that_came_or_went_after_the_end_are_noticed(change):
    """Although a warning was given before training, when the model was counted."""
    model = sparsify(convolutional_net())
    controller = SparsityController(model, Target(sparsity=0.9))
    with pytest.warns(UserWarning, match="no step was made"):
        count(model, IMAGES)
    controller.step(1.0)
    change(model)
    with pytest.warns(UserWarning, match="does not meet .* changed since"):
        count(model, IMAGES)


COMPUTING = [
    lambda module: prune.l1_unstructured(module, "weight", 0.3),
    nn.utils.spectral_norm,
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.orthogonal,
]


@pytest.mark.parametrize("compute", COMPUTING, ids=["prune", "spectral_norm", "new spectral_norm", "orthogonal"])
def test_weights_that_other_code_computes_are_refused(compute):
    """They change after a solve, so that the target would be missed in silence."""
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    controller = SparsityController(model, Target(sparsity=0.5))
    compute(model[0])
    with pytest.raises(ValueError, match="'0' is no plain Parameter any more"):
        controller.step(1.0)
    del controller
    with pytest.raises(ValueError, match="'0' is no plain Parameter any more"):
        SparsityController(model, Target(sparsity=0.5))


def test_a_second_parametrization_is_refused():
    model = sparsify(nn.LSTM(4, 8))
    nn.utils.parametrizations.spectral_norm(model, "weight_hh_l0")
    with pytest.raises(ValueError, match="'weight_hh_l0' is no plain Parameter any more"):
        SparsityController(model, Target(sparsity=0.5))


@pytest.mark.parametrize("target", [{"sparsity": 0.9}, {"flops_share": 0.2}, {"layers": ...}])
def test_weights_that_changed_after_the_end_are_noticed(target):
    """By an optimizer that goes on, or by an earlier checkpoint; weights that meet the target raise no warning."""
    model = sparsify(convolutional_net())
    if "layers" in target:
        target = {"layers": dict.fromkeys(str_layers(model), 0.9)}
    controller = SparsityController(model, Target(**target), example_input=IMAGES)
    controller.step(0.2)
    with controller.exact():
        early = copy.deepcopy(model.state_dict())
    controller.step(1.0)
    final = copy.deepcopy(model.state_dict())
    model.load_state_dict(early)
    with pytest.warns(UserWarning, match="does not meet .* changed since"):
        count(model, IMAGES)
    controller.finish()
    model.load_state_dict(final)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller._control.warned = False
        count(model, IMAGES)
    with torch.no_grad():
        model[0].weight.mul_(10)
    with pytest.warns(UserWarning, match="does not meet .* changed since"):
        densify(model)


def test_the_weights_of_a_model_are_checked_once(monkeypatch):
    """And not once for each of its layers."""
    model = sparsify(convolutional_net())
    controller, checks = SparsityController(model, Target(sparsity=0.9)), []
    monkeypatch.setattr(type(controller), "still_meets", lambda self: checks.append(self) or True)
    controller.step(1.0)
    count(model, IMAGES)
    densify(model)
    assert checks == [controller, controller]


def test_an_average_is_finished_before_the_model_is_densified():
    model = sparsify(nn.LSTM(4, 8))
    controller, average = SparsityController(model, Target(sparsity=0.5)), copy.deepcopy(model)
    controller.step(1.0)
    densify(model)
    for use in (lambda: controller.finish(average), lambda: controller.exact(average).__enter__()):
        with pytest.raises(ValueError, match="own model was densified"):
            use()


def test_a_single_weight_and_a_bare_layer():
    layer = STRLinear(1, 1)
    controller = SparsityController(layer, Target(sparsity=0.5))
    controller.step(1.0)
    assert layer.sparse_weight != 0


# Targets that name each layer's share.

SHARES = {"0": 0.5, "3": 0.9, "6": 0.0, "10": 0.987}


@pytest.mark.parametrize("granularity", ["layer", "filter"])
@pytest.mark.parametrize("shares", [SHARES, SHARES | {"6": 1.0}])
def test_each_layer_meets_its_own_share(granularity, shares):
    model = sparsify(convolutional_net(), granularity=granularity)
    controller = SparsityController(model, Target(layers=shares), begin=0.0, end=0.5, schedule="linear", interval=1)
    controller.step(0.25)
    halfway = {row.name: row.params - row.nonzeros for row in count(model, IMAGES).rows if row.params}
    controller.step(1.0)
    zeros = {row.name: row.params - row.nonzeros for row in count(model, IMAGES).rows if row.params}
    sizes = {name: module.weight.numel() for name, module in str_layers(model).items()}
    assert zeros == {name: round(share * sizes[name]) for name, share in shares.items()}
    assert halfway == {name: round(0.5 * number) for name, number in zeros.items()}


def test_the_shares_hold_in_exact_and_after_a_resume():
    def make():
        model = sparsify(convolutional_net())
        return model, SparsityController(model, Target(layers=SHARES), interval=100)

    model, controller = make()
    controller.step(0.1)
    controller.step(0.8)
    before = {name: layer.raw_threshold.clone() for name, layer in str_layers(model).items()}
    with controller.exact():
        assert count(model, IMAGES).rows[1].nonzeros == 4608 - round(0.9 * 4608)
        state = copy.deepcopy(controller.state_dict())
    after = {name: layer.raw_threshold for name, layer in str_layers(model).items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    other, resumed = make()
    resumed.load_state_dict(state)
    assert all(torch.equal(layer.raw_threshold, before[name]) for name, layer in str_layers(other).items())


@pytest.mark.parametrize(
    ("shares", "options", "sparse", "message"),
    [
        ({"0": 0.5}, {}, {}, "no share .*'10'"),
        (SHARES | {"9": 0.5}, {}, {}, "'9'.* no thresholded layer"),
        (SHARES, {"distribution": "learned"}, {}, "no distribution 'learned'"),
        (SHARES, {}, {"granularity": "global"}, "no target by layers"),
        (SHARES | {"0": 1.01}, {}, {}, r"'0' .*\[0, 1\].* 1\.01"),
        (SHARES | {"0": float("nan")}, {}, {}, "got nan"),
    ],
)
def test_shares_that_do_not_fit_are_refused(shares, options, sparse, message):
    model = sparsify(convolutional_net(), **sparse)
    with pytest.raises(ValueError, match=message):
        SparsityController(model, Target(layers=shares), **options)
