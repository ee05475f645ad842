"""The rank controller: the largest model not above the target, schedules, ties, and a training left undisturbed."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from str_triton import (
    LowRankLinear,
    LowRankWeight,
    RankController,
    RankTarget,
    Target,
    count_ranks,
    densify,
    parameter_groups,
    sparsify,
)

SHAPES = [(12, 9, None), (9, 9, None), (30, 10, 7), (8, 1, None), (6, 40, 6)]


def matrices(model):
    return [module for module in model.modules() if isinstance(module, LowRankWeight)]


def set_sizes(matrix, sizes):
    """Components of these sizes in any directions, split at random between the factors and m."""
    with torch.no_grad():
        matrix.u.copy_(nn.functional.normalize(torch.randn_like(matrix.u), dim=0) * (torch.rand(len(sizes)) + 0.5))
        matrix.v.copy_(nn.functional.normalize(torch.randn_like(matrix.v), dim=0) * (torch.rand(len(sizes)) + 0.5))
        matrix.m.copy_(sizes / (matrix.u.norm(dim=0) * matrix.v.norm(dim=0)))
        matrix.m.mul_(torch.randint(2, matrix.m.shape) * 2 - 1)


def random_model(seed=0, g="exp", shapes=SHAPES):
    torch.manual_seed(seed)
    model = nn.Sequential()
    for i, (rows, columns, max_rank) in enumerate(shapes):
        raw = {"identity": 0.005, "sigmoid": -7.0}.get(g, -9.0) * (1 + 0.1 * i)
        layer = LowRankLinear(columns, rows, max_rank=max_rank, g=g, raw_threshold_init=raw, recurrent=i % 2 == 1)
        set_sizes(layer.weight, (torch.rand(layer.weight.max_rank) * 0.9 + 0.05) * 0.7**i)
        model.append(layer)
    return model.append(nn.BatchNorm1d(6)).append(nn.GRU(6, 5))


def solve(controller, progress=1.0):
    """A controller whose steps leave out new factors and settled ranks, which have tests of their own."""
    controller.progress = progress
    controller.solve()


def ranks(model):
    return [matrix.rank for matrix in matrices(model)]


def cost(model, own_ranks, kind):
    """By its definition, from shapes and ranks alone."""
    others = 12 + 9 + 30 + 8 + 6 + 2 * 6 + 3 * 5 * (6 + 5 + 2)  # Biases, the norm, the GRU.
    factored = [
        min(rank * (matrix.rows + matrix.columns), matrix.rows * matrix.columns)
        for matrix, rank in zip(matrices(model), own_ranks, strict=True)
    ]
    if kind == "total_rank":
        return sum(own_ranks)
    if kind == "recurrent_flops":
        return factored[1] + factored[3] + 3 * 5 * 5
    return others + sum(factored)


def brute_force(model, kind, most):
    """The ranks of the largest model not above `most`, of all that one common offset gives."""
    every = [
        matrix.pruning_offsets().double() if kind != "recurrent_flops" or matrix.recurrent else None
        for matrix in matrices(model)
    ]
    edges = torch.cat([offsets for offsets in every if offsets is not None]).sort().values
    best = None
    for offset in [edges[0] - 1, *((edges[1:] + edges[:-1]) / 2), edges[-1] + 1]:
        found = [
            matrix.max_rank if offsets is None else max(1, int((offsets > offset).sum()))
            for matrix, offsets in zip(matrices(model), every, strict=True)
        ]
        key = (cost(model, found, kind), sum(found))
        if key[0] <= most and (best is None or key > best[0]):
            best = (key, found)
    return best[1]


@pytest.mark.parametrize("kind", ["total_rank", "params", "recurrent_flops", "compression"])
@pytest.mark.parametrize(
    ("g", "distribution"),
    [("exp", "relative"), ("exp", "fixed"), ("sigmoid", "fixed"), ("softplus", "fixed"), ("identity", "fixed")],
)
def test_the_result_is_the_largest_model_not_above_the_target(kind, g, distribution):
    for seed in range(3):
        model = random_model(seed, g)
        full, ones = [m.max_rank for m in matrices(model)], [1] * len(SHAPES)
        free = ones if kind != "recurrent_flops" else [1 if m.recurrent else m.max_rank for m in matrices(model)]
        least, largest = cost(model, free, kind), cost(model, full, kind)
        dense = cost(model, [10**6] * len(SHAPES), "params")
        targets = [least, largest, largest - 1, *torch.randint(least, largest, (3,)).tolist()]
        for most in targets:
            value = dense / most if kind == "compression" else most
            tried = copy.deepcopy(model)
            controller = RankController(tried, RankTarget(**{kind: value}), distribution=distribution)
            expected = brute_force(tried, kind, most)
            solve(controller)
            assert ranks(tried) == expected, (seed, most)
            for before, after in zip(matrices(model), matrices(tried), strict=True):
                assert torch.equal(before.m, after.m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = random_model(1).to(dtype)
    controller = RankController(model, RankTarget(params=700))
    expected = brute_force(model, "params", 700)
    solve(controller)
    assert ranks(model) == expected


def test_relative_thresholds_are_shares_of_the_norms_of_the_matrices():
    model = random_model()
    solve(RankController(model, RankTarget(total_rank=15)))
    shares = [matrix.threshold / matrix.singular_values().norm() for matrix in matrices(model)]
    torch.testing.assert_close(torch.stack(shares), shares[0].expand(len(shares), 1))


@pytest.mark.parametrize("settled", [False, True])
def test_the_scale_of_a_matrix_does_not_change_relative_ranks(settled):
    found = {}
    for distribution in ("relative", "fixed"):
        for scale in (1.0, 30.0):
            model = random_model()
            controller = RankController(model, RankTarget(total_rank=15), distribution=distribution)
            matrices(model)[1].u.data.mul_(scale)
            if settled:
                controller.step(0.3)
            else:
                controller.step(0.0)
                solve(controller)
            found[distribution, scale] = ranks(model)
    assert found["relative", 1.0] == found["relative", 30.0]
    assert found["fixed", 1.0] != found["fixed", 30.0]


def test_relative_thresholds_follow_weights_that_are_loaded_later():
    """Thresholds that a state dict brings are undone by a step, as those of an optimizer are, before it measures."""
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=15))
    model.load_state_dict(random_model(seed=1).state_dict())
    controller.step(0.0)
    shares = torch.stack([matrix.threshold / matrix.singular_values().norm() for matrix in matrices(model)])
    torch.testing.assert_close(shares, shares[:1].expand(len(shares), 1))


@pytest.mark.parametrize("zeros", ["u", "v", "m"])
def test_a_matrix_of_zeros_takes_no_rank_from_the_others(zeros):
    model = random_model(shapes=[(20, 20, None)] * 3)
    getattr(matrices(model)[1], zeros).data.zero_()
    controller = RankController(model, RankTarget(total_rank=20))
    assert ranks(model) == [20, 0, 20]
    controller.finish()
    assert ranks(model)[1] <= 1
    assert 19 <= sum(ranks(model)) <= 20


def test_a_new_controller_cuts_nothing():
    model = random_model(shapes=[(20, 20, None)] * 6)
    for matrix in matrices(model)[1:]:
        set_sizes(matrix, torch.rand(20) * 1e-8 + 1e-8)
        matrix.raw_threshold.data.fill_(-18.5)  # hardly below them
    matrices(model)[0].raw_threshold.data.fill_(-3.2)  # 0.04; the sizes are 0.05 and more
    RankController(model, RankTarget(total_rank=60))
    assert ranks(model) == [20] * 6


def test_relative_thresholds_need_exp():
    with pytest.raises(ValueError, match=r"g=\"exp\".*not 'sigmoid': use distribution=\"fixed\""):
        RankController(random_model(g="sigmoid"), RankTarget(total_rank=15))


def test_the_parameters_are_those_of_the_compact_model():
    for params in (500, 640, 808):
        model = random_model(2)
        solve(RankController(model, RankTarget(params=params)))
        compact = nn.Sequential(*[m.compact() if isinstance(m, LowRankLinear) else m for m in model])
        size = sum(parameter.numel() for parameter in compact.parameters())
        assert size == count_ranks(model).params == count_ranks(compact).params
        assert params - (30 + 10) < size <= params


def test_a_compression_that_was_counted_gives_the_same_model():
    """dense / params, and back by a division of floats."""
    model = random_model(3)
    for total in range(5, 30):
        solve(RankController(model, RankTarget(total_rank=total)))
        budget = count_ranks(model)
        solve(RankController(model, RankTarget(compression=budget.compression)))
        assert count_ranks(model).params == budget.params


def test_a_full_matrix_costs_no_more_than_the_dense_one():
    model = nn.Sequential(LowRankLinear(10, 10, bias=False))
    for params, rank in [(100, 10), (99, 4), (80, 4), (79, 3), (20, 1)]:
        solve(RankController(model, RankTarget(params=params)))
        assert ranks(model) == [rank]


def test_one_offset_moves_all_thresholds():
    model = random_model()
    before = torch.cat([matrix.raw_threshold.detach() for matrix in matrices(model)])
    solve(RankController(model, RankTarget(total_rank=25), distribution="fixed"))
    after = torch.cat([matrix.raw_threshold.detach() for matrix in matrices(model)])
    assert (after - before).std() < 1e-6 < (after - before).mean()


@pytest.mark.parametrize(("schedule", "expected"), [("cubic", 32 - 24 * 0.875), ("linear", 20), ("constant", 8)])
def test_schedules(schedule, expected):
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=8), schedule=schedule, begin=0.2, end=0.6)
    for progress, total in [(0.0, 32), (0.19, 32), (0.4, expected), (0.6, 8), (1.0, 8)]:
        solve(controller, progress)
        controller.solve()
        assert sum(ranks(model)) == total
    controller.progress = 0.0
    controller.solve()  # And back.
    assert sum(ranks(model)) == 32


def test_the_schedule_begins_at_the_cost_of_all_components():
    model, untouched = random_model(), random_model()
    controller = RankController(model, RankTarget(params=500), distribution="fixed", schedule="linear", end=1.0)
    full = count_ranks(model).params
    for progress in (0.25, 0.5, 0.75):
        controller.progress = progress
        controller.solve()
        most = full - round(progress * (full - 500))
        assert ranks(model) == brute_force(untouched, "params", most)


def test_no_matrix_is_emptied():
    model = random_model(shapes=[(20, 20, None)] * 6)  # Sizes fall by 0.7 from one to the next.
    set_sizes(matrices(model)[-1], torch.rand(20) * 1e-4)
    for total in (6, 7, 40):
        tried = copy.deepcopy(model)
        solve(RankController(tried, RankTarget(total_rank=total), distribution="fixed"))
        assert sum(ranks(tried)) == total
        assert min(ranks(tried)) == ranks(tried)[-1] == 1


def test_the_bounds_of_learned_thresholds_empty_no_matrix():
    model = random_model(shapes=[(20, 20, None)] * 3)
    set_sizes(matrices(model)[-1], torch.rand(20) * 1e-3)
    options = {"distribution": "learned", "schedule": "constant", "interval": 5, "end": 1.0}
    controller = RankController(model, RankTarget(total_rank=20), **options)
    for progress in (0.1, 0.2, 0.3, 0.4, 0.5):  # One solve, at the first.
        controller.step(progress)
        assert ranks(model)[-1] == 1
        assert sum(ranks(model)) == 20
    solve(controller)
    held_back = torch.stack(controller._held_back)
    assert held_back[-1] > 1
    assert (raw_thresholds(model) + held_back).diff().abs().max() <= 1


def test_a_threshold_is_held_back_no_longer_than_it_must():
    model = random_model(shapes=[(20, 20, None)] * 3)
    for matrix in matrices(model):
        matrix.raw_threshold.data.fill_(-5.0)
    set_sizes(matrices(model)[-1], torch.rand(20) * 1e-2)
    controller = RankController(
        model, RankTarget(total_rank=3), distribution="fixed", schedule="linear", end=1.0, begin=0.0
    )
    solve(controller)
    assert ranks(model) == [1, 1, 1]
    assert raw_thresholds(model).diff().abs().max() > 1
    for _ in range(3):
        solve(controller)  # What is held back stays where it is.
    assert ranks(model) == [1, 1, 1]
    controller.progress = 0.0
    controller.solve()
    assert ranks(model) == [20, 20, 20]
    assert raw_thresholds(model).diff().abs().max() < 1e-5


def raw_thresholds(model):
    return torch.cat([matrix.raw_threshold.detach() for matrix in matrices(model)])


@pytest.mark.parametrize("g", ["exp", "sigmoid", "softplus"])
@pytest.mark.parametrize("twins", [1, 3])
def test_equal_components_are_cut_one_by_one(g, twins):
    """Orthogonal matrices, whose singular values are equal up to rounding, and copies of them."""
    dense = 0.5 * nn.init.orthogonal_(torch.empty(64, 16))
    model = nn.Sequential(*[LowRankLinear.from_dense(linear(dense), g=g) for _ in range(twins)])
    weights = [matrix.weight().detach() for matrix in matrices(model)]
    for total in range(16 * twins, twins - 1, -1):
        tried = copy.deepcopy(model)
        controller = RankController(tried, RankTarget(total_rank=total), distribution="fixed")
        solve(controller)
        assert sum(ranks(tried)) == total
        assert min(ranks(tried)) >= 1
        separated = [matrix.m.clone() for matrix in matrices(tried)]
        controller.solve()
        assert all(torch.equal(matrix.m, m) for matrix, m in zip(matrices(tried), separated, strict=True))
        for matrix, weight, m in zip(matrices(tried), weights, separated, strict=True):
            matrix.raw_threshold.data.fill_(-30.0)  # All of them again: the function is the same.
            matrix.m.data.copy_(m)
            torch.testing.assert_close(matrix.weight(), weight, rtol=0, atol=1e-3)


def linear(weight):
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data.copy_(weight)
    return dense


def test_components_that_a_threshold_tells_apart_keep_their_m():
    """Down to differences of 1.3e-5, hardly more than what counts as equal; and also where others are equal."""
    for ties, step in [(0, 1.3e-5), (3, 1e-3)]:
        model = nn.Sequential(LowRankLinear(40, 40))
        offsets = step * torch.arange(40)
        offsets[:ties] = 0
        set_sizes(matrices(model)[0], 0.5 * offsets.exp())
        before = matrices(model)[0].m.clone()
        for total in (39, 38, 21, 2, 1):
            solve(RankController(model, RankTarget(total_rank=total)))
            assert ranks(model) == [total]
        assert torch.equal(matrices(model)[0].m[ties:], before[ties:])
        assert torch.equal(matrices(model)[0].m, before) == (ties == 0)


def test_equal_components_inside_exact_go_together_and_m_stays():
    model = nn.Sequential(LowRankLinear.from_dense(linear(torch.eye(8))), LowRankLinear(8, 8))
    set_sizes(matrices(model)[0], torch.tensor([4.0, 3, 3, 3, 2, 1, 1, 1]))
    set_sizes(matrices(model)[1], torch.tensor([0.1] * 8))
    controller = RankController(model, RankTarget(total_rank=11))
    controller.progress = 1.0
    before = copy.deepcopy(model.state_dict())
    with controller.exact():
        assert ranks(model) == [1, 8]  # The eight equal largest of the second stay, and leave 3, not 4 and 3, 3, 3.
        assert all(torch.equal(matrix.m, before[f"{i}.weight.m"]) for i, matrix in enumerate(matrices(model)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    controller.solve()
    assert sum(ranks(model)) == 11


@pytest.mark.parametrize("distribution", ["relative", "fixed"])
@pytest.mark.parametrize("of_an_average", [False, True])
def test_finish_cuts_equal_components_one_by_one(of_an_average, distribution):
    """Also without a step before it; the exact model keeps its m, a finished one need not."""
    orthogonal = 0.5 * nn.init.orthogonal_(torch.empty(16, 16))
    model = nn.Sequential(*[LowRankLinear.from_dense(linear(orthogonal)) for _ in range(2)])
    for total in (2, 8, 31):
        tried, average = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
        controller = RankController(tried, RankTarget(total_rank=total), distribution=distribution)
        controller.finish(average if of_an_average else None)
        assert sum(ranks(average if of_an_average else tried)) == total


def test_from_which_distance_offsets_differ():
    """8 units of rounding, of float32 at 1."""
    model = nn.Sequential(LowRankLinear(3, 3, g="identity", raw_threshold_init=0.0))
    controller = RankController(model, RankTarget(total_rank=2), distribution="fixed")
    controller.progress = 1.0
    for units, rank in ((8, 1), (9, 2)):
        with torch.no_grad():
            matrices(model)[0].m.copy_(torch.tensor([1.0, 0.5 + units * 2**-23, 0.5]))
            for factor in (matrices(model)[0].u, matrices(model)[0].v):
                factor.copy_(torch.eye(3))
        with controller.exact():
            assert ranks(model) == [rank]


def test_components_of_size_zero_do_not_confuse_the_solve():
    model = random_model()
    with torch.no_grad():
        matrices(model)[0].m[2:] = 0
        matrices(model)[2].m.zero_()
    controller = RankController(model, RankTarget(total_rank=12))
    solve(controller)
    # One of the matrix of zeros is kept as any matrix keeps one, though it is nothing.
    assert sum(ranks(model)) == 11
    assert raw_thresholds(model).isfinite().all()
    controller.target, controller._keep = RankTarget(total_rank=30), 30  # More than there are.
    solve(controller)
    assert ranks(model) == [2, 9, 0, 1, 6]
    assert raw_thresholds(model).isfinite().all()


def test_nothing_to_cut():
    model = nn.Sequential(LowRankLinear(8, 8, max_rank=1), LowRankLinear(8, 8, max_rank=1))
    before = raw_thresholds(model)
    solve(RankController(model, RankTarget(total_rank=2), distribution="fixed"))
    assert ranks(model) == [1, 1]
    assert torch.equal(raw_thresholds(model), before)


def test_rounding_is_that_of_the_largest_offset():
    model = nn.Sequential(LowRankLinear.from_dense(linear(nn.init.orthogonal_(torch.empty(32, 32)))))
    model.append(LowRankLinear(8, 8, max_rank=2))
    set_sizes(matrices(model)[1], torch.tensor([1.0, 1 + 1e-6]) * matrices(model)[1].threshold.detach())
    for total in range(31, 2, -7):
        tried = copy.deepcopy(model)
        solve(RankController(tried, RankTarget(total_rank=total), distribution="fixed"))
        assert ranks(tried) == [total - 1, 1]


def test_components_that_no_threshold_reaches_are_kept():
    model = random_model(g="sigmoid")
    set_sizes(matrices(model)[0], torch.arange(9) + 0.5)
    solve(RankController(model, RankTarget(total_rank=5), distribution="fixed"))
    assert ranks(model) == [8, 1, 1, 1, 1]
    assert raw_thresholds(model).isfinite().all()


def test_shared_matrices_count_once():
    model = random_model(shapes=[(9, 9, None)] * 2)
    model[1].weight = model[0].weight
    controller = RankController(model, RankTarget(total_rank=4))
    solve(controller)
    assert ranks(model) == [4]
    tied = LowRankLinear(9, 9)
    tied.weight.u, tied.weight.v, tied.weight.m = model[0].weight.u, model[0].weight.v, model[0].weight.m
    tied.weight.raw_threshold = model[0].weight.raw_threshold
    assert count_ranks(model.append(tied)).total_rank == 4
    del controller
    solve(RankController(model, RankTarget(total_rank=3)))
    assert ranks(model) == [3, 3]
    assert all(matrix.control for matrix in matrices(model))


def test_compact_matrices_have_a_fixed_cost():
    model = random_model()
    solve(RankController(model, RankTarget(total_rank=12)))
    model[2] = model[2].compact()
    fixed = count_ranks(model).rows[2].rank
    model[1].weight = nn.Parameter(model[1].weight.weight().detach())
    solve(RankController(model, RankTarget(total_rank=fixed + 4)))
    assert count_ranks(model).total_rank == fixed + 4
    assert count_ranks(model).rows[1].rank == fixed
    with pytest.raises(ValueError, match=f" {fixed + 3} to {fixed + 9 + 1 + 6}"):
        RankController(model, RankTarget(total_rank=2))


@pytest.mark.parametrize("distribution", ["fixed", "learned"])
def test_a_target_in_recurrent_flops_leaves_other_thresholds_alone(distribution):
    model = random_model()
    before = raw_thresholds(model)
    solve(RankController(model, RankTarget(recurrent_flops=140), distribution=distribution))
    assert torch.equal(raw_thresholds(model)[::2], before[::2])
    assert ranks(model)[::2] == [9, 7, 6]
    learns = [matrix.learns_threshold for matrix in matrices(model)]
    assert learns == [False, distribution == "learned"] * 2 + [False]
    assert [matrix.control is not None for matrix in matrices(model)] == [False, True, False, True, False]


def train(model, controller, optimizer, begin, end, steps=30):
    for i in range(begin, end):
        torch.manual_seed(i)
        loss = (model(torch.randn(8, 12)) - torch.randn(8, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step((i + 1) / steps)


def make_run(distribution="learned", **options):
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(12, 16), nn.Tanh(), LowRankLinear(16, 16), nn.Tanh(), LowRankLinear(16, 6))
    nn.init.orthogonal_(dense := torch.empty(16, 16))
    matrices(model)[1].set_weight(dense)
    controller = RankController(model, RankTarget(compression=2), interval=4, distribution=distribution, **options)
    groups = parameter_groups(model, 5e-4)
    return model, controller, torch.optim.SGD(groups, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("inside_exact", [True, False])
@pytest.mark.parametrize("at", [14, 20])  # before the ranks are settled, and after
@pytest.mark.parametrize("distribution", ["relative", "fixed", "learned"])
def test_state_dict_resumes_bit_for_bit(distribution, at, inside_exact):
    model, controller, optimizer = make_run(distribution)
    train(model, controller, optimizer, 0, at)
    if inside_exact:
        with controller.exact():
            state = copy.deepcopy((model.state_dict(), controller.state_dict(), optimizer.state_dict()))
    else:
        own = controller.state_dict()
        state = copy.deepcopy((model.state_dict(), own, optimizer.state_dict()))
    train(model, controller, optimizer, at, 30)
    other, first, other_optimizer = make_run(distribution)
    del first  # A model has one controller.
    other.load_state_dict(state[0])
    # Made now, where the thresholds are no longer the first ones.
    other_controller = RankController(other, RankTarget(compression=2), interval=4, distribution=distribution)
    other_controller.load_state_dict(state[1])
    other_optimizer.load_state_dict(state[2])
    train(other, other_controller, other_optimizer, at, 30)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert 2 <= count_ranks(model).compression < 2.3


def test_exact_leaves_training_as_it_was():
    model, controller, optimizer = make_run(schedule="constant", end=0.95)
    train(model, controller, optimizer, 0, 27)
    with torch.no_grad():
        for matrix in matrices(model):
            matrix.m.mul_(torch.rand_like(matrix.m) + 0.2)
    before, drifted = copy.deepcopy(model.state_dict()), count_ranks(model).params
    with controller.exact():
        inside = count_ranks(model).params
        state = controller.state_dict()
    assert inside <= count_ranks(model).dense_params / 2 < inside + 32
    assert drifted != inside
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for raw, matrix in zip(state["raw_thresholds"], matrices(model), strict=True):
        assert torch.equal(raw, matrix.raw_threshold)


def test_a_step_that_is_refused_changes_nothing():
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=15))
    with controller.exact():
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"step\(\) inside exact"):
            controller.step(0.5)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_settled_ranks_stay_while_the_rest_trains():
    model, controller, optimizer = make_run(end=0.5)
    train(model, controller, optimizer, 0, 14)
    cut = matrices(model)[0].weight().detach()
    controller.step(0.5)
    assert controller._control.reached
    settled = [matrix.spectrum() != 0 for matrix in matrices(model)]
    assert torch.equal(raw_thresholds(model), torch.full((3,), -10.0))
    budget = count_ranks(model)
    assert 2 <= budget.compression < 2.3
    train(model, controller, optimizer, 15, 30)
    assert controller._control.reached
    with controller.exact():
        assert count_ranks(model).params == budget.params
    for matrix, survivors in zip(matrices(model), settled, strict=True):
        assert torch.equal(matrix.m != 0, survivors)
    assert not torch.allclose(matrices(model)[0].weight(), cut)
    controller.finish()
    assert controller._control.reached


def test_a_layer_that_was_replaced_after_the_ranks_are_fixed_is_noticed():
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=15), end=0.4)
    controller.step(0.5)
    model[0] = LowRankLinear(9, 12)
    for use in (controller.finish, lambda: controller.step(1.0), lambda: controller.exact().__enter__()):
        with pytest.raises(ValueError, match="make a new controller"):
            use()
    with pytest.warns(UserWarning, match="does not meet .* changed since"):
        model[1].compact()


def test_a_matrix_that_was_added_is_named_in_a_warning():
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=15), end=0.4)
    controller.step(0.5)
    model.append(LowRankLinear(6, 6))
    with pytest.warns(UserWarning, match="were there then"):
        controller.step(1.0)
    assert sum(ranks(model)) == 15 + 6


def test_densify_leaves_the_rank_controller_of_the_same_model_alone():
    model = sparsify(nn.Sequential(LowRankLinear(9, 9), nn.Linear(9, 9)))
    controller = RankController(model, RankTarget(total_rank=4))
    controller.step(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        densify(model)
    controller.step(1.0)
    assert model[0].weight.rank == 4


@pytest.mark.parametrize("target", [{"total_rank": 15}, {"compression": 2}, {"recurrent_flops": 130}])
def test_layers_that_are_replaced_by_their_compact_forms_meet_the_target(target):
    model = random_model()
    controller = RankController(model, RankTarget(**target))
    controller.step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, layer in enumerate(list(model)):
            if isinstance(layer, LowRankLinear):
                model[number] = layer.compact()
        assert controller.still_meets()


def test_ranks_that_changed_after_the_end_are_noticed():
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=15))
    early = copy.deepcopy(model.state_dict())
    controller.step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0].compact()
    model.load_state_dict(early)
    with pytest.warns(UserWarning, match="does not meet .* changed since"):
        model[0].compact()


def test_settling_does_not_change_the_function():
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=15), end=0.4)
    for progress in (0.0, 0.2, 0.3):
        controller.step(progress)
    twin = copy.deepcopy(model)
    solved = RankController(twin, RankTarget(total_rank=15), schedule="constant")
    for matrix in matrices(twin):
        matrix.refactor()
    solve(solved)
    controller.step(0.4)
    assert ranks(model) == ranks(twin)
    for before, after in zip(matrices(twin), matrices(model), strict=True):
        torch.testing.assert_close(after.weight(), before.weight())


def test_settled_ranks_leave_out_no_component_that_fits():
    filled = 0
    for seed in range(3):
        model = random_model(seed)
        full = [matrix.max_rank for matrix in matrices(model)]
        for most in torch.randint(cost(model, [2] * 5, "params"), cost(model, full, "params"), (4,)).tolist():
            tried, common = copy.deepcopy(model), copy.deepcopy(model)
            RankController(tried, RankTarget(params=most)).step(0.5)
            for matrix in matrices(common):
                matrix.refactor()
            solve(RankController(common, RankTarget(params=most)))
            found, before = ranks(tried), ranks(common)
            assert cost(tried, found, "params") <= most
            assert all(rank >= least for rank, least in zip(found, before, strict=True))
            filled += sum(found) - sum(before)
            for i in range(len(found)):
                one_more = [rank + (i == j) for j, rank in enumerate(found)]
                assert found[i] == full[i] or cost(tried, one_more, "params") > most
    assert filled > 3


def test_survivors_are_factored_anew_before_every_fifth_solve(monkeypatch):
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=15), end=0.6, interval=3)
    steps, refactor = [], LowRankWeight.refactor
    monkeypatch.setattr(LowRankWeight, "refactor", lambda self: (steps.append(controller.steps), refactor(self)))
    for i in range(40):
        controller.step(i / 80)
    assert sorted(set(steps)) == [0, 15, 30]
    for matrix in matrices(model):
        left = matrix.spectrum() != 0
        u, v = matrix.u[:, left], matrix.v[:, left]
        torch.testing.assert_close(u.mT @ u, torch.diag(matrix.singular_values()[left]))
        torch.testing.assert_close(v.mT @ v, u.mT @ u)
        torch.testing.assert_close(matrix.m[left], torch.ones(int(left.sum())))


def test_a_learned_distribution_is_the_optimizers():
    ratios = []
    for distribution in ("fixed", "learned"):
        model, controller, optimizer = make_run(distribution, end=0.95)
        train(model, controller, optimizer, 0, 27)
        ratios.append((raw_thresholds(model) + torch.stack(controller._held_back)).diff())
    assert ratios[0].abs().max() < 1e-5  # All began at the same.
    assert 1e-4 < ratios[1].abs().max() <= 1


def test_a_learned_distribution_moves_slowly_and_then_stays():
    model, controller, _ = make_run(end=0.95)
    controller.step(0.0)
    before = raw_thresholds(model)
    for progress, expected in [(0.1, [0.04, -0.04, 0.02]), (0.6, [0.0, 0.0, 0.0])]:
        with torch.no_grad():
            for matrix, move in zip(matrices(model), (0.4, -0.4, 0.2), strict=True):
                matrix.raw_threshold.add_(move)
        controller.step(progress)
        torch.testing.assert_close(raw_thresholds(model) - before, torch.tensor(expected), rtol=0, atol=1e-5)
        before = raw_thresholds(model)


def test_a_solve_reads_no_value():
    """A fake tensor has none: whatever decides by one raises."""
    with FakeTensorMode():
        model = nn.Sequential(*[LowRankLinear(6, 5, recurrent=True) for _ in range(3)])
        for kind, value in [("total_rank", 7), ("params", 70), ("recurrent_flops", 50), ("compression", 1.5)]:
            controller = RankController(model, RankTarget(**{kind: value}), distribution="learned")
            solve(controller, 0.3)
            solve(controller)
            controller.state_dict()
            del controller
        with pytest.raises(RuntimeError):
            ranks(model)  # The test can fail.


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["total_rank", "params", "recurrent_flops", "compression"])
def test_a_solve_does_not_wait_for_the_gpu(kind):
    model, twin = random_model().cuda(), random_model()
    value = {"total_rank": 11, "params": 600, "recurrent_flops": 140, "compression": 1.8}[kind]
    controllers = [RankController(m, RankTarget(**{kind: value}), distribution="learned") for m in (model, twin)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve(controllers[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    solve(controllers[1])
    assert ranks(model) == ranks(twin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "total_rank, params, recurrent_flops, compression.* none"),
        ({"total_rank": 3, "params": 4}, "exactly one"),
        ({"total_rank": 0}, "total_rank .*at least 1.* 0"),
        ({"params": -1}, "params .*at least 1.* -1"),
        ({"recurrent_flops": 0.5}, "recurrent_flops .*at least 1.* 0.5"),
        ({"compression": 0.9}, "compression .*at least 1.* 0.9"),
        ({"compression": float("nan")}, "compression .*nan"),
    ],
)
def test_targets_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RankTarget(**options)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"total_rank": 33}, "above .*total_rank=33.* 5 to 32"),
        ({"total_rank": 4}, "below .*total_rank=4.* 5 to 32"),
        ({"params": 1002}, "above .*params=1002.* 405 to 989"),
        ({"params": 404}, "below .*params=404.* 405 to 989"),
        ({"params": float("inf")}, "above .*params=inf.* 405 to 989"),
        ({"recurrent_flops": 10**6}, "above .*recurrent_flops=1000000.* 101 to 164"),
        ({"recurrent_flops": 100}, "below .*recurrent_flops=100.* 101 to 164"),
        ({"compression": 1}, r"above .*compression=1.* 1\.0203 to 2\.4913"),
        ({"compression": 2.56}, r"below .*compression=2.56.* 1\.0203 to 2\.4913"),
        ({"compression": float("inf")}, "below .*compression=inf"),
    ],
)
def test_targets_out_of_reach(target, message):
    with pytest.raises(ValueError, match=message):
        RankController(random_model(), RankTarget(**target))


@pytest.mark.parametrize("kind", ["total_rank", "params", "recurrent_flops", "compression"])
def test_the_bounds_that_a_message_names_are_possible(kind):
    for end in (0, 1):
        with pytest.raises(ValueError, match="possible are") as error:
            RankController(random_model(), RankTarget(**{kind: 1 if kind != "compression" else 10**6}))
        bound = str(error.value).split("possible are ")[1].split(" to ")[end]
        solve(RankController(random_model(), RankTarget(**{kind: float(bound)})))


def test_models_that_cannot_be_controlled():
    plain = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"no low-rank matrix.* RankTarget"):
        RankController(plain, RankTarget(total_rank=3))
    with pytest.raises(ValueError, match="no recurrent low-rank matrix"):
        RankController(nn.Sequential(LowRankLinear(3, 3)), RankTarget(recurrent_flops=3))
    for target in (4, Target(sparsity=0.9)):
        with pytest.raises(TypeError, match=r"RankTarget\(compression=4\), got"):
            RankController(random_model(), target)
    with pytest.raises(ValueError, match=r"meta device .*to_empty"):
        RankController(random_model().to("meta"), RankTarget(total_rank=10))
    model = random_model()
    matrices(model)[0].raw_threshold = matrices(model)[1].raw_threshold
    with pytest.raises(ValueError, match="give each its own"):
        RankController(model, RankTarget(total_rank=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "quadratic"}, "'cubic', 'linear', 'constant'.* 'quadratic'"),
        ({"begin": 0.5, "end": 0.2}, "0.5 and 0.2"),
        ({"distribution": "flop-aware"}, "'fixed', 'learned'.* 'flop-aware'"),
        ({"interval": 0}, "interval.* at least 1.* 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RankController(random_model(), RankTarget(total_rank=10), **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_without_a_rank_is_named(bad):
    model = random_model()
    controller = RankController(model, RankTarget(total_rank=10))
    matrices(model)[1].m.data[2] = bad
    with pytest.raises(ValueError, match=r"'1\.weight' .*NaN or infinity"), controller.exact():
        pass
    for progress in (0.1, 0.5):
        with pytest.raises(ValueError, match=r"'1\.weight' .*NaN or infinity"):
            controller.step(progress)


def test_steps_out_of_range_and_foreign_states_are_refused():
    controller, other = make_run()[1], RankController(random_model(), RankTarget(total_rank=10))
    for progress in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"got {progress}"):
            controller.step(progress)
    with pytest.raises(ValueError, match="raw thresholds of shapes"):
        controller.load_state_dict(other.state_dict())
