"""New ways to distribute zeros over layers, beside those of the library, at equal sparsity and at equal FLOPs.

    python -m benchmarks.studies.distributions --data-dir DIR [--variants ...] [--targets 0.95 0.99]
                                               [--flops 0.06 0.014] [--seeds 0 1 2]

Appends a line per run to benchmarks/results/distributions.jsonl and skips runs that it already holds. Network, images
(10,000 of Fashion-MNIST, in six epochs), batches and optimizer are those of exact_budgets_screen.py. The gradient is
the library's default: straight-through until half of training, then masked. docs/exact-budgets.md derives the rules.
"""

import argparse
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.runs import RunFile
from benchmarks.studies import exact_budgets_screen as screen
from benchmarks.studies.exact_budgets_rules import INTERVAL, Rule, Sgd, Static, Tensors
from benchmarks.studies.exact_budgets_screen import Soft, Variant
from benchmarks.timing import RESULTS, machine
from str_triton import soft_threshold
from str_triton.cnn.data import load

RUNS = RunFile(RESULTS / "distributions.jsonl", ("variant", "unit", "target", "seed"))
SWITCH = 0.5  # share of training with the straight-through gradient, as in SparsityController


@dataclass
class Relative(Rule):
    """Thresholds in proportion to the norm of a layer's survivors, to a power, and to (FLOPs per weight) ** cost.

    With `power` 1 that is LAMP (Lee et al., 2021). With `noise` they are in proportion to |survivors|^2 / |weights|,
    which makes the sum over the layers of |pruned|^2 / |survivors|^2, the relative noise, stationary.
    """

    power: float = 1.0
    cost: float = 0.0
    noise: bool = False
    steps = 0

    def begin(self, costs: Tensor) -> Tensor:
        self.costs = costs
        return self.cost * costs.log()

    def update(self, tilt: Tensor, weights: Tensors, raws: Tensors, progress: float, lr: float) -> Tensor:
        self.steps += 1
        if self.steps % INTERVAL:
            return tilt
        kept = torch.stack([(w * (w.abs() > raw.exp())).norm() for w, raw in zip(weights, raws, strict=True)]).log()
        if self.noise:
            kept = 2 * kept - torch.stack([w.norm() for w in weights]).log()
        goal = self.power * kept + self.cost * self.costs.log()
        tilt = torch.lerp(tilt, goal - goal.mean(), 0.2)
        return tilt - tilt.mean()


@dataclass
class Growth(Rule):
    """Thresholds that give way where the weights at the threshold grow, until half of training.

    Growth is lr * mean(-sign(w) dL/dS) / threshold, summed over steps: how much the optimizer would lengthen weights
    between 0.7 and 1.4 thresholds, in parts of the threshold. A layer's log threshold falls by `rate` times its growth
    minus the mean of all layers, within `bound`.
    """

    rate: float
    cost: float = 0.0
    bound: float = 0.7

    def begin(self, costs: Tensor) -> Tensor:
        self.first = self.cost * (costs.log() - costs.log().mean())
        return self.first

    def update(self, tilt: Tensor, weights: Tensors, raws: Tensors, progress: float, lr: float) -> Tensor:
        if not 0.05 < progress < SWITCH:
            return tilt
        growth = []
        for w, raw in zip(weights, raws, strict=True):
            where = (w.abs() > 0.7 * raw.exp()) & (w.abs() < 1.4 * raw.exp())
            growth.append((-w.sign() * w.grad)[where].mean().nan_to_num() / raw.exp()[0])
        growth = 10 * lr * torch.stack(growth)  # momentum 0.9 makes a step ten times as long
        tilt = tilt - self.rate * (growth - growth.mean())
        tilt = self.first + (tilt - self.first).clamp(-self.bound, self.bound)
        return tilt - tilt.mean()


class Costed(Soft):
    """Soft thresholds whose offset meets a share of the weights or of the FLOPs. The gradient is switched."""

    def __init__(self, variant: Variant, weights: list[Tensor], costs: Tensor, target: float, *, unit: str) -> None:
        super().__init__(variant, weights, costs, target)
        self.costs = costs if unit == "FLOPs" else torch.ones_like(costs)
        self.gradient = "straight_through"
        self.sizes = torch.tensor([float(w.numel()) for w in weights])

    def budget(self, progress: float) -> float:
        """Return what the schedule leaves."""
        return (1 - self.sparsity(progress)) * float(self.sizes @ self.costs)

    @torch.no_grad()
    def solve(self, progress: float) -> None:
        critical, caps, costs = [], [], []
        for w, tilt, floor, cost in zip(self.weights, self.tilt, self.floors, self.costs, strict=True):
            offsets = w.abs().flatten().log() - tilt
            largest = torch.topk(offsets, floor)
            caps.append(largest.values[-1] - 1e-4)
            offsets[largest.indices] = math.inf
            critical.append(offsets)
            costs.append(cost.expand(w.numel()))
        order = torch.cat(critical).sort(descending=True)
        spent = torch.cat(costs)[order.indices].double().cumsum(0)
        kept = int((spent <= self.budget(progress) * (1 + 1e-9)).sum())
        offset = order.values[kept] if kept < len(spent) else order.values[-1] - 1
        for raw, tilt, cap in zip(self.raws, self.tilt, caps, strict=True):
            raw.fill_(float(min(offset, cap) + tilt))

    def sparse(self) -> list[Tensor]:
        return [
            soft_threshold(w, raw, g="exp", gradient=self.gradient)
            for w, raw in zip(self.weights, self.raws, strict=True)
        ]

    def learn(self, progress: float, lr: float) -> None:
        super().learn(progress, lr)
        self.gradient = "straight_through" if progress < SWITCH else "masked"


class Shares(Costed):
    """Soft thresholds that keep the same share of each layer, or with `erk` shares ~ sum(shape) / numel, at most 1."""

    def __init__(self, *args, erk: bool, **options) -> None:
        super().__init__(*args, **options)
        self.shares = torch.tensor([sum(w.shape) / w.numel() if erk else 1.0 for w in self.weights])

    @torch.no_grad()
    def solve(self, progress: float) -> None:
        budget, low, high = self.budget(progress), 0.0, float(1 / self.shares.min())
        for _ in range(60):
            scale = (low + high) / 2
            density = (scale * self.shares).clamp(max=1)
            low, high = (scale, high) if float(density * self.sizes @ self.costs) <= budget else (low, scale)
        for w, raw, share in zip(self.weights, self.raws, (low * self.shares).clamp(max=1), strict=True):
            pruned = min(w.numel() - int(share * w.numel()), w.numel() - 1)
            raw.fill_(float(w.abs().flatten().kthvalue(pruned).values.log()) if pruned else -20.0)


RULES = {
    "fixed": Variant(Rule),
    "flop-aware": Variant(lambda: Static(0.2)),
    "learned": Variant(lambda: Sgd(0.1, bound=0.5, freeze=0.35)),
    "growth": Variant(lambda: Growth(1.0)),
    "growth, slow": Variant(lambda: Growth(0.25)),
    "growth, unbounded": Variant(lambda: Growth(1.0, bound=math.inf)),
    "growth, FLOP-aware": Variant(lambda: Growth(1.0, cost=0.2)),
    "noise": Variant(lambda: Relative(noise=True)),
    "noise, FLOP-aware": Variant(lambda: Relative(noise=True, cost=0.5)),
    "LAMP": Variant(lambda: Relative()),
    "LAMP, half": Variant(lambda: Relative(power=0.5)),
    "LAMP, half, FLOP-aware": Variant(lambda: Relative(power=0.5, cost=0.35)),
}
SHARES = {"uniform": False, "ERK": True}


def variant(name: str, unit: str) -> Variant:
    """Return the variant of the screen for a name in RULES or SHARES."""
    if name in SHARES:
        return Variant(pruner=partial(Shares, unit=unit, erk=SHARES[name]))
    return Variant(RULES[name].rule, pruner=partial(Costed, unit=unit))


def main() -> None:
    names = [*RULES, *SHARES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the four IDX files of Fashion-MNIST")
    parser.add_argument("--variants", nargs="*", default=names, choices=names, metavar="VARIANT")
    parser.add_argument("--targets", nargs="*", type=float, default=[0.95, 0.99], help="sparsities")
    parser.add_argument("--flops", nargs="*", type=float, default=[0.06, 0.014], help="shares of the FLOPs to keep")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("fashion-mnist", options.data_dir)
    goals = [("FLOPs", 1 - share) for share in options.flops] + [("weights", target) for target in options.targets]
    keys = [
        {"variant": name, "unit": unit, "target": round(target, 6), "seed": seed}
        for seed in options.seeds
        for unit, target in goals
        for name in options.variants
    ]
    for key in RUNS.missing(keys):
        name = key["variant"]
        screen.VARIANTS[name] = variant(name, key["unit"])
        run = screen.train(name, key["target"], key["seed"], data, options.images, options.epochs)
        RUNS.append(run | key | {"machine": machine()})
        print(*key.values(), f"{run['accuracy']:.4f}, FLOPs {run['flops']:.4f}")


if __name__ == "__main__":
    main()
