"""Exactness at every promised point: whatever the dtype, however many weights are equal, for averages too."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from str_triton import RankController, RankTarget, SparsityController, Target, count, count_ranks, densify, sparsify
from str_triton.budget.offset_controller import OffsetController
from str_triton.nn import LowRankLinear, thresholded_weights

KINDS = {
    "normal": lambda w: w,
    "grid": lambda w: (w * 7 / w.abs().max()).round() / 7 * w.abs().max(),
    "ternary": lambda w: w.sign() * (w.abs() > w.abs().mean()),
    "binary": lambda w: w.sign() + (w == 0),
    "constant": lambda w: torch.full_like(w, -0.25),
    "half zeros": lambda w: w * (torch.arange(w.numel()).reshape(w.shape) % 2),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def network(kind: str, dtype: torch.dtype, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    width = int(torch.randint(3, 24, (), generator=generator))
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 4, 12), nn.Linear(12, 5))
    with torch.no_grad():
        for layer in (model[0], model[2], model[3]):
            layer.weight.copy_(KINDS[kind](torch.randn(layer.weight.shape, generator=generator) * 0.05))
    return model.to(dtype)


def survivors(model: nn.Module) -> list[int]:
    return [int(weight.sparse.count_nonzero()) for weight in thresholded_weights(model)]


def check(controller: SparsityController, model: nn.Module, available: list[int], target: dict) -> None:
    kept, sizes = survivors(model), [weight.dense.numel() for weight in thresholded_weights(model)]
    floors = [layer.floor for layer in controller._layers]
    assert all(k >= min(f, a) for k, f, a in zip(kept, floors, available, strict=True))
    if "layers" in target:
        wanted = [size - round(s * size) for size, s in zip(sizes, target["layers"].values(), strict=True)]
        assert kept == [min(w, a) for w, a in zip(wanted, available, strict=True)]
    elif "sparsity" in target:
        assert sum(kept) == min(sum(sizes) - round(target["sparsity"] * sum(sizes)), sum(available))
    else:
        costs = [layer.cost for layer in controller._layers]
        cost = sum(k * c for k, c in zip(kept, costs, strict=True))
        most = controller._keep
        full = sum(a * c for a, c in zip(available, costs, strict=True))
        assert cost <= most
        assert cost > min(most, full) - max(costs) or cost == full


def targets(model: nn.Module, number: int) -> dict:
    share = (0.1, 0.5, 0.77, 0.9, 0.98)[number % 5]
    if number % 3 == 1:
        budget = count(model, torch.zeros(1, 3, 4, 4, dtype=next(model.parameters()).dtype))
        return {"flops": round((1 - share) * budget.dense_flops)}
    if number % 3 == 2:
        return {"layers": {"0": share, "2": 0.5, "3": 1 - share}}
    return {"sparsity": share}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_for_every_dtype_and_repetition(kind, dtype):
    """36 networks, targets and options for each kind and dtype, each at the end, inside exact() and densified."""
    granularities, gs = ("layer", "filter", "weight"), ("exp", "softplus", "sigmoid", "identity")
    for seed, (granularity, g) in enumerate(itertools.product(granularities * 3, gs)):
        model = network(kind, dtype, seed)
        target = targets(model, seed)
        available = [int(m.weight.count_nonzero()) for m in (model[0], model[2], model[3])]
        floor = 0.0 if granularity != "layer" else (0.0, 0.5, 1.0)[seed % 3]
        if "layers" in target and granularity != "layer":
            target = {"sparsity": 0.5}
        sparsify(model, granularity=granularity, g=g)
        image = torch.zeros(1, 3, 4, 4, dtype=dtype)
        controller = SparsityController(model, Target(**target), example_input=image, floor=floor, end=0.8)
        before = copy.deepcopy(model.state_dict())
        controller.progress = 0.9
        with controller.exact():
            check(controller, model, available, target)
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before), (seed, "exact() puts everything back")
        controller.finish()
        check(controller, model, available, target)
        kept = survivors(model)
        plain = densify(model)
        assert [int(plain[i].weight.count_nonzero()) for i in (0, 2, 3)] == kept


def test_large_bfloat16_layers():
    """Two bytes have 256 magnitudes in each octave: thousands of weights are equal at the cut."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False)).to(torch.bfloat16)
    controller = SparsityController(sparsify(model), Target(sparsity=0.9))
    controller.step(1.0)
    total = 2 * 512 * 512
    assert sum(survivors(model)) == total - round(0.9 * total)


def test_equal_weights_survive_in_order():
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    model = sparsify(nn.Sequential(model))
    SparsityController(model, Target(nonzeros=6), floor=0).finish()
    assert model[0].sparse_weight.flatten().nonzero().flatten().tolist() == list(range(6))


def trained(steps: int, stop: int | None = None, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(3)
    model = sparsify(nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4)).to(dtype))
    controller = SparsityController(model, Target(sparsity=0.8), interval=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(model, controller, optimizer, 0, steps if stop is None else stop, steps)
    return model, controller, optimizer


def run(model, controller, optimizer, begin, end, steps):
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 20, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step((step + 1) / steps)


@pytest.mark.parametrize("at", [6, 18, 25])
def test_a_checkpoint_from_inside_exact_resumes_bit_for_bit(at):
    """bfloat16: at most points some equal weights were told apart, and the state knows what they were."""
    model, controller, optimizer = trained(30, at)
    with controller.exact():
        states = copy.deepcopy((model.state_dict(), controller.state_dict(), optimizer.state_dict()))
    run(model, controller, optimizer, at, 30, 30)
    other, other_controller, other_optimizer = trained(30, 0)
    for part, state in zip((other, other_controller, other_optimizer), states, strict=True):
        part.load_state_dict(state)
    run(other, other_controller, other_optimizer, at, 30, 30)
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_finish_ends_what_the_last_step_left_open():
    model, controller, _ = trained(30, 29)
    total = 20 * 40 + 40 * 4
    assert sum(survivors(model)) != total - round(0.8 * total)
    controller.finish()
    assert sum(survivors(model)) == total - round(0.8 * total)


def test_an_unfinished_model_warns_once():
    model, controller, _ = trained(30, 20)
    example = torch.zeros(1, 20, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with controller.exact():
            count(model, example)
    with pytest.warns(UserWarning, match=r"0\.6667.*finish\(\)"):
        densify(copy.deepcopy(model))
    other, finished, _ = trained(30, 20)
    finished.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        densify(other)


def test_a_copy_made_before_training_says_that_it_is_a_copy():
    model = sparsify(nn.Linear(8, 8))
    controller = SparsityController(model, Target(sparsity=0.5))
    average = AveragedModel(model)
    controller.step(0.5)
    average.update_parameters(model)
    with pytest.warns(UserWarning, match=r"is a copy .* then \(no step was made\).*finish\(copy\)"):
        count(average, torch.zeros(1, 8))


def test_a_finished_model_is_finished_after_a_resume():
    model, controller, _ = trained(30, 30)
    with controller.exact():
        states = copy.deepcopy((model.state_dict(), controller.state_dict()))
    other, resumed, _ = trained(30, 0)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        densify(other)


def test_progress_that_goes_backwards_and_a_second_controller_are_errors():
    model, controller, _ = trained(30, 20)
    with pytest.raises(ValueError, match=r"backwards, got 0\.5"):
        controller.step(0.5)
    with pytest.raises(ValueError, match="has a controller"):
        SparsityController(model, Target(sparsity=0.5))
    SparsityController(copy.deepcopy(model), Target(sparsity=0.5))  # a copy has none
    del controller
    SparsityController(model, Target(sparsity=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_meet_the_target_by_their_own_weights(dtype):
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4)).to(dtype))
    controller = SparsityController(model, Target(sparsity=0.9), interval=4)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(40):
        model(torch.randn(16, 20).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step((step + 1) / 40)
        average.update_parameters(model)
    total = 20 * 40 + 40 * 4
    keep = total - round(0.9 * total)
    own, before = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state_dict())
    with controller.exact(average):
        assert sum(survivors(average)) == keep
    after = average.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    controller.finish(average)
    assert sum(survivors(average)) == keep
    kept = [w.sparse != 0 for w in thresholded_weights(average)]
    for weight, alive in zip(thresholded_weights(average), kept, strict=True):
        assert weight.dense[alive].abs().min() >= weight.dense[~alive].abs().max()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="'0'"):
        controller.finish(sparsify(nn.Sequential(nn.Linear(3, 3))))


def test_an_average_can_be_finished_inside_exact():
    model, controller, _ = trained(30, 20)
    average = AveragedModel(model)
    before = copy.deepcopy(model.state_dict())
    with controller.exact():
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if "weight" in key)
        controller.finish(average)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_own_model_takes_no_step_and_does_not_finish_inside_exact():
    """Leaving exact() would undo both, and the model would be taken for one that has reached its target."""
    model, controller, _ = trained(30, 20)
    with controller.exact():
        for call in (lambda: controller.step(1.0), controller.finish, lambda: controller.finish(model)):
            with pytest.raises(ValueError, match=r"inside exact\(\)"):
                call()
    assert not controller._control.reached
    controller.finish()
    assert controller._control.reached


class Mixture(nn.Module):
    """Two experts in one raw Parameter, which sparsify does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.head = nn.Linear(6, 4)


@pytest.mark.parametrize("target", [{"sparsity": 0.4}, {"flops_share": 0.6}])
def test_a_controller_measures_what_count_counts(target):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2))
    model[1].weight.data[0] = 0  # a dense layer's zeros count too
    sparsify(model, exclude=["1"])
    image = torch.randn(1, 8)
    controller = SparsityController(model, Target(**target), schedule="linear", end=1.0, example_input=image)
    controller.step(0.25)
    with controller.exact():
        assert controller.measure() == {"sparsity": pytest.approx(count(model, image).sparsity)}
    controller.finish()
    assert controller.measure() == {"sparsity": pytest.approx(count(model, image).sparsity)}


@pytest.mark.parametrize(
    "target", [{"sparsity": 0.4}, {"nonzeros": 50}, {"flops_share": 0.6}, {"layers": {"0": 0.5, "2": 0.25}}]
)
@pytest.mark.parametrize("progress", [0.25, 0.5, 1.0])
def test_what_the_schedule_asks_for_is_what_count_counts_when_it_is_exact(target: dict, progress: float):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2))
    sparsify(model, exclude=["1"])
    image = torch.randn(1, 8)
    controller = SparsityController(model, Target(**target), begin=0.2, end=0.8, example_input=image)
    controller.step(progress)
    with controller.exact():
        budget = count(model, image)
    if "flops_share" in target:
        one = 1 / budget.dense_flops
        assert controller.scheduled() == {"flops_share": pytest.approx(budget.flops / budget.dense_flops, abs=one)}
    else:
        assert controller.scheduled() == {"sparsity": pytest.approx(budget.sparsity)}


def test_a_rank_controller_measures_the_ranks():
    model = nn.Sequential(LowRankLinear(8, 6), LowRankLinear(6, 8))
    controller = RankController(model, RankTarget(total_rank=5))
    controller.step(1.0)
    assert controller.measure() == {"total_rank": 5}


def test_weights_that_are_not_covered_are_named():
    with pytest.warns(UserWarning, match=r"covers 25\.0 % .* experts\. "):
        SparsityController(sparsify(Mixture()), Target(sparsity=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparsityController(sparsify(Mixture(), exclude=["experts"]), Target(sparsity=0.5))
        SparsityController(sparsify(Mixture(), parameters=["experts"]), Target(sparsity=0.5)).finish()


@pytest.mark.parametrize(("size", "warns"), [(10, False), (11, True)])
def test_the_warning_begins_above_one_percent(size, warns):
    """Count 990 covered weights and `size` others: 10 are 1 % of all."""
    model = nn.Sequential(nn.Linear(33, 30), Mixture())
    model[1].experts, model[1].head = nn.Parameter(torch.randn(size, 1)), nn.Identity()
    sparsify(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SparsityController(model, Target(sparsity=0.5))
    assert [("1.experts" in str(w.message), "98.9 %" in str(w.message)) for w in caught] == [(True, True)] * warns


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ({"sparsity": 0.5}, r"150 of the 200 thresholded weights \(75\.00 %\)"),
        ({"nonzeros": 60}, r"150 of the 200 "),
        ({"flops_share": 0.5}, r"150 of the 200 "),
        ({"layers": {"0": 0.5, "1": 0.95}}, r"60 of the 100 thresholded weights of 0 \(60\.00 %\)"),
    ],
)
def test_a_model_with_more_zeros_than_the_target_says_so(target, part):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight[:6] = 0
        model[1].weight[:9] = 0
    sparsify(model)
    with pytest.warns(UserWarning, match=part) as caught:
        controller = SparsityController(model, Target(**target), example_input=torch.zeros(1, 10))
    assert len(caught) == 1
    controller.finish()
    if "layers" not in target:
        assert count(model, torch.zeros(1, 10)).nonzeros == 50
    del controller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for enough in ({"sparsity": 0.75}, {"sparsity": 0.0}, {"layers": {"0": 0.6, "1": 0.9}}):
            SparsityController(model, Target(**enough))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_elements_are_no_obstacle():
    """Such as those of nn.AdaptiveLogSoftmaxWithLoss where the model is small."""
    model = sparsify(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 0), nn.Linear(0, 4)))
    controller = SparsityController(model, Target(sparsity=0.9))
    controller.step(0.1)
    controller.finish()
    assert count(model, torch.zeros(1, 10)).nonzeros == 10
    densify(model)


def test_a_lazy_layer_is_named():
    model = sparsify(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), exclude=["1"])
    with pytest.raises(ValueError, match="'1' is lazy"):
        SparsityController(model, Target(sparsity=0.5))


@pytest.mark.parametrize("steps", [12, 40])
def test_averages_meet_a_target_of_ranks(steps):
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(16, 24), nn.ReLU(), LowRankLinear(24, 8))
    controller = RankController(model, RankTarget(total_rank=9), interval=4)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        model(torch.randn(16, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step((step + 1) / 40)
        average.update_parameters(model)
    before = copy.deepcopy(average.state_dict())
    with controller.exact(average):
        inside = count_ranks(average).total_rank
    assert inside == 9 if steps == 40 else 9 <= inside < 24
    after = average.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    controller.finish(average)
    assert count_ranks(average).total_rank == 9


def enter_exact(controller: SparsityController) -> None:
    with controller.exact():
        pass


@pytest.mark.parametrize("call", [SparsityController.finish, enter_exact, lambda c: c.step(1.0)])
def test_a_weight_that_is_nan_is_an_error_where_exactness_is_promised(call):
    model, controller, _ = trained(30, 20, torch.float32)
    with torch.no_grad():
        model[2].weight[1, 1] = torch.nan
    controller.step(0.7)  # in between nothing is promised
    with pytest.raises(ValueError, match=r"'2' holds NaN"):
        call(controller)


@pytest.mark.parametrize("kind", KINDS)
def test_the_solve_of_gpus_keeps_floors_and_nearly_the_budget(kind):
    """The path without host synchronization, run on the CPU: equal weights are cut together, down to the floors."""
    model = network(kind, torch.float32, 1)
    sparsify(model)
    controller = SparsityController(model, Target(sparsity=0.9))
    shifts, controller._held_back = OffsetController._shifts(controller, 1.0)
    with torch.no_grad():
        controller._thresholds.move(shifts)
    kept = survivors(model)
    assert all(k >= layer.floor or kind == "half zeros" for k, layer in zip(kept, controller._layers, strict=True))
    if kind == "normal":
        total = sum(layer.size for layer in controller._layers)
        assert abs(sum(kept) - (total - round(0.9 * total))) <= 1


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.9999])
def test_the_solve_of_gpus_cuts_what_the_hosts_does_where_no_threshold_reaches_most_weights(sparsity):
    """A sigmoid's thresholds lie below 1: larger weights survive it, however many they are, and all others are cut."""
    model = network("normal", torch.float32, 1)
    for layer in (model[0], model[2], model[3]):
        layer.weight.data[layer.weight.abs() > layer.weight.abs().median()] = 2.0
    controller = SparsityController(sparsify(model, g="sigmoid"), Target(sparsity=sparsity), floor=0)
    left = []
    for shifts in (controller._allocated(1.0)[0], OffsetController._shifts(controller, 1.0)[0]):
        before = controller._thresholds.save()
        controller._thresholds.move(shifts)
        assert all(raw.isfinite().all() for raw in controller._raws)
        left.append(survivors(model))
        controller._thresholds.restore(before)
    assert left[0] == left[1]
    reached = sum(left[0]) - sum(int((use.dense == 2).sum()) for use in thresholded_weights(model))
    assert (reached > 0) == (sparsity < 0.5)


@pytest.mark.parametrize("done", [0.5, 1.0])
def test_the_solve_of_gpus_meets_each_layers_share(done):
    model = sparsify(network("normal", torch.float32, 1))
    names = [use.name for use in thresholded_weights(model)]
    shares = {name: 0.2 + 0.7 * i / len(names) for i, name in enumerate(names)}
    controller = SparsityController(model, Target(layers=shares))
    shifts, held_back = OffsetController._shifts(controller, done)
    controller._thresholds.move(shifts)
    zeros = [use.dense.numel() - left for use, left in zip(thresholded_weights(model), survivors(model), strict=True)]
    sizes = [use.dense.numel() for use in thresholded_weights(model)]
    shares = shares.values()
    assert zeros == [round(done * round(share * size)) for share, size in zip(shares, sizes, strict=True)]
    assert not any(held_back)


def test_an_optimizer_with_weight_decay_moves_no_held_threshold():
    """DistributedDataParallel gives a parameter without a use the gradient zero, and weight decay then moves it."""
    (model, controller, _), (other, undisturbed, _) = trained(30, 3), trained(30, 3)
    raws = [use.raw for use in thresholded_weights(model)]
    for raw in raws:
        raw.grad = torch.zeros_like(raw)
    torch.optim.SGD(raws, lr=1.0, weight_decay=0.1).step()
    assert not torch.equal(raws[0], next(iter(thresholded_weights(other))).raw)
    controller.step(4 / 30)
    undisturbed.step(4 / 30)
    assert all(torch.equal(raw, use.raw) for raw, use in zip(raws, thresholded_weights(other), strict=True))


def test_the_own_model_is_not_densified_inside_exact():
    model, controller, _ = trained(30, 20)
    with controller.exact():
        with pytest.raises(ValueError, match="copy"):
            densify(model)
        densify(copy.deepcopy(model))
    controller.finish()
    densify(model)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda model: model[2].weight.data.view(-1)[:1].fill_(torch.nan), r"weight '2' holds NaN"),
        (lambda model: model[2].raw_threshold.data.fill_(torch.nan), r"raw threshold of '2' holds NaN"),
        (lambda model: model[2].raw_threshold.data.fill_(torch.inf), r"raw threshold of '2' holds an infinity"),
        (lambda model: model[2].raw_threshold.data.fill_(-torch.inf), r"raw threshold of '2' holds an infinity"),
    ],
)
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_error_names_what_is_not_finite(by_layer, spoil, name):
    model = network("normal", torch.float32, 1)
    sparsify(model)
    target = Target(layers={"0": 0.5, "2": 0.5, "3": 0.5}) if by_layer else Target(sparsity=0.5)
    controller = SparsityController(model, target)
    controller.step(0.5)
    spoil(model)
    with pytest.raises(ValueError, match=name):
        controller.finish()


@pytest.mark.parametrize("call", [SparsityController.finish, enter_exact, lambda c: c.step(1.0)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_controller_of_a_densified_model_is_refused(call, tied):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    if tied:
        model[2].weight = model[0].weight
    sparsify(model)
    controller = SparsityController(model, Target(sparsity=0.5))
    controller.finish()
    densify(copy.deepcopy(model))  # a copy's thresholds are its own
    controller.finish()
    densify(model)
    with pytest.raises(ValueError, match=r"after densify"):
        call(controller)
