"""The study of distributions: budgets are met, and the rules move the thresholds as they say."""

import pytest
import torch

from benchmarks.studies import distributions
from benchmarks.studies.distributions import RULES, SHARES, Growth, Relative, variant

COSTS = torch.tensor([16.0, 4.0, 1.0])


def weights() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(20, 30), torch.randn(40, 20, 3, 3) / 3, torch.randn(10, 40) / 2]


def test_every_line_can_be_run_again() -> None:
    assert {run["variant"] for run in distributions.RUNS.read()} <= {*RULES, *SHARES}


@pytest.mark.parametrize("name", ["fixed", "flop-aware", "noise, FLOP-aware", "uniform", "ERK"])
@pytest.mark.parametrize("unit", ["weights", "FLOPs"])
def test_the_budget_is_met_to_a_weight(name: str, unit: str) -> None:
    layers = weights()
    own = variant(name, unit)
    pruner = own.pruner(own, layers, COSTS, 0.95)
    pruner.solve(1.0)
    kept = torch.tensor([float(sparse.count_nonzero()) for sparse in pruner.sparse()])
    costs = COSTS if unit == "FLOPs" else torch.ones(3)
    sizes = torch.tensor([float(w.numel()) for w in layers])
    off = float(costs @ kept - 0.05 * costs @ sizes)
    assert abs(off) <= (float(costs.sum()) if name in SHARES else float(costs.max()))
    assert kept.min() > 0


def test_growth_lowers_the_threshold_where_the_weights_at_it_grow() -> None:
    rule, layers = Growth(rate=1.0), weights()
    tilt = rule.begin(COSTS)
    for w, sign in zip(layers, (-1, 0, 1), strict=True):
        w.grad = 1e-3 * sign * w.sign()  # against the gradient the first layer's weights grow
    raws = [torch.zeros(1) for _ in layers]
    moved = rule.update(tilt, layers, raws, 0.2, lr=0.1) - tilt
    assert torch.allclose(moved, torch.tensor([-1e-3, 0.0, 1e-3]), atol=1e-9)
    assert torch.equal(rule.update(tilt, layers, raws, 0.7, lr=0.1), tilt)


def test_noise_is_stationary_under_the_budget() -> None:
    """Pruning a weight at the threshold adds the same relative noise per cost in every layer."""
    rule, layers = Relative(noise=True, cost=0.5), weights()
    tilt = rule.begin(COSTS)
    for _ in range(2000):
        raws = [(tilt[i : i + 1] - 1.0) for i in range(3)]
        tilt = rule.update(tilt, layers, raws, 0.2, lr=0.1)
    thresholds = (tilt - 1.0).exp()
    kept = torch.stack([(w * (w.abs() > t)).square().sum() for w, t in zip(layers, thresholds, strict=True)])
    whole = torch.stack([w.square().sum() for w in layers])
    noise = whole * thresholds.square() / kept.square() / COSTS
    assert noise.max() / noise.min() == pytest.approx(1, abs=0.05)
