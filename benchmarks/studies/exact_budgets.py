"""Exact budgets on Fashion-MNIST: the controller's distributions beside magnitude pruning and the dense network.

    python -m benchmarks.studies.exact_budgets --data-dir DIR [--methods ...] [--targets 0.9 0.95 0.99] [--seeds 0 1 2]

Appends a line per run to benchmarks/results/exact_budgets.jsonl and skips runs that it already holds. `--picture FILE`
draws accuracy against FLOPs of all lines. benchmarks/studies/exact_budgets_screen.py selected these methods from more
candidates. All methods share the network, the images (without augmentation), their order, the optimizer and the cubic
schedule, which reaches its target at 70 % of training.
"""

import argparse
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import charts
from benchmarks.runs import RunFile
from benchmarks.timing import RESULTS, machine
from str_triton import SparsityController, Target, count, parameter_groups, sparsify
from str_triton.cnn.data import batches, load

RUNS = RunFile(RESULTS / "exact_budgets.jsonl", ("method", "target", "seed"))
BATCH, LR, WEIGHT_DECAY, END = 100, 0.1, 5e-4, 0.7
IMAGE = torch.zeros(1, 1, 28, 28)


class Block(nn.Module):
    """A 3x3 convolution, batch norm and ReLU, with a shortcut if the shape does not change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return x + y if self.residual else y


def network(widths: tuple[int, int, int] = (24, 48, 96)) -> nn.Module:
    """Build a network of seven layers, 239,640 weights and 3.3 million multiply-adds; two cores train it in minutes."""
    a, b, c = widths
    blocks = [Block(1, a, 2), Block(a, b, 2), Block(b, b, 1), Block(b, c, 2), Block(c, c, 1), Block(c, c, 1)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


class Dense:
    """A dense network, without pruning."""

    def __init__(self, model: nn.Module, target: float) -> None:
        self.model = model

    def step(self, progress: float) -> None:
        pass


class Magnitude(Dense):
    """Global magnitude pruning on the same schedule, every 10 steps, with the controller's floor per layer."""

    def __init__(self, model: nn.Module, target: float) -> None:
        self.target, self.steps = target, 0
        self.weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.floors = [max(1, min(w.shape[0], int(0.5 * (1 - target) * w.numel()))) for w in self.weights]
        self.masks = [torch.ones_like(w) for w in self.weights]

    @torch.no_grad()
    def step(self, progress: float) -> None:
        if self.steps % 10 == 0 or progress == 1:
            done = 1 - (1 - min(progress / END, 1)) ** 3
            magnitudes = torch.cat([w.abs().flatten() for w in self.weights])
            pruned = round(self.target * done * len(magnitudes))
            cut = magnitudes.kthvalue(pruned).values if pruned else magnitudes.new_tensor(-1.0)
            for w, mask, floor in zip(self.weights, self.masks, self.floors, strict=True):
                kept = w.abs().flatten().topk(floor).values[-1]
                mask.copy_((w.abs() > cut) | (w.abs() >= kept))
        for w, mask in zip(self.weights, self.masks, strict=True):
            w.mul_(mask)
        self.steps += 1


def controlled(
    gradient: str, flop_exponent: float = 0.0, **options
) -> Callable[[nn.Module, float], SparsityController]:
    """Return STR with a controller. Thresholds are proportional to (FLOPs per weight) ** flop_exponent at first."""

    def make(model: nn.Module, target: float) -> SparsityController:
        sparsify(model, gradient=gradient)
        costs = {row.name: row.dense_flops / row.params for row in count(model, IMAGE).covered_rows}
        with torch.no_grad():
            for name, cost in costs.items():
                model.get_submodule(name).raw_threshold.add_(flop_exponent * math.log(cost))
        throughout = {"straight_through_until": 1.0} | options
        return SparsityController(model, Target(sparsity=target), end=END, interval=10, **throughout)

    return make


METHODS: dict[str, Callable] = {
    "dense": Dense,
    "magnitude": Magnitude,
    "global": controlled("straight_through", distribution="fixed"),
    "global, switched": controlled("straight_through", distribution="fixed", straight_through_until=0.5),
    "learned": controlled("straight_through", distribution="learned"),
    "FLOP-aware": controlled("straight_through", 0.2, distribution="fixed"),
}


def accuracy(model: nn.Module, data, seed: int) -> float:
    model.eval()
    with torch.no_grad():
        hits = [
            (model(images).argmax(1) == labels).float().sum().item()
            for images, labels in batches(
                data, batch_size=500, seed=seed, epoch=0, augment=False, shuffle=False, workers=0
            )
        ]
    return sum(hits) / len(data)


def fit(model: nn.Module, pruner, optimizer: torch.optim.Optimizer, data, seed: int, epochs: float) -> None:
    """Train for `epochs`, maybe a fraction, with linear warmup and half a cosine. Call `pruner.step` each step."""
    lr, per_epoch = optimizer.param_groups[0]["lr"], len(data.train) // BATCH
    steps, step = round(epochs * per_epoch), 0
    for epoch in range(math.ceil(epochs)):
        stream = batches(
            data.train, batch_size=BATCH, seed=seed, epoch=epoch, augment=False, shuffle=True, workers=0, drop_last=True
        )
        for images, labels in islice(stream, steps - step):
            progress = step / steps
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, progress / 0.1) * 0.5 * (1 + math.cos(math.pi * progress))
            loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            pruner.step(step / steps)


def measured(model: nn.Module, data, seed: int) -> dict:
    """Return test accuracy, sparsity, FLOPs as a share of the dense network's, and the density of each layer."""
    budget = count(model, IMAGE)
    return {
        "accuracy": accuracy(model, data.test, seed),
        "sparsity": budget.sparsity,
        "flops": budget.flops / budget.dense_flops,
        "density": [1 - row.sparsity for row in budget.covered_rows],
    }


def sgd(model: nn.Module, lr: float = LR, weight_decay: float = WEIGHT_DECAY) -> torch.optim.SGD:
    return torch.optim.SGD(parameter_groups(model, weight_decay), lr=lr, momentum=0.9, nesterov=True)


def train(method: str, target: float, seed: int, data, epochs: int) -> dict:
    """Train once and return the results, with the density of each layer."""
    torch.manual_seed(seed)
    model, begin = network().to(memory_format=torch.channels_last), time.perf_counter()
    pruner = METHODS[method](model, target)
    fit(model, pruner, sgd(model), data, seed, epochs)
    run = {"method": method, "target": target, "seed": seed, "images": len(data.train), "epochs": epochs}
    return run | measured(model, data, seed) | {"seconds": time.perf_counter() - begin}


def picture(lines: list[dict], path: Path) -> None:
    """Draw accuracy against FLOPs as SVG: a curve per method, a point per target, mean and deviation over the seeds."""
    figure, (axes,) = charts.new("exact_budgets")
    for method in dict.fromkeys(line["method"] for line in lines):
        runs = [line for line in lines if line["method"] == method]
        points = [[run for run in runs if run["target"] == t] for t in sorted({run["target"] for run in runs})]
        flops = [100 * mean(run["flops"] for run in point) for point in points]
        accuracies = [[100 * run["accuracy"] for run in point] for point in points]
        heights = [mean(seeds) for seeds in accuracies]
        if method == "dense":
            axes.axhline(heights[0], color="grey", linestyle="--", label="dense")
        else:
            deviations = [stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in accuracies]
            axes.errorbar(flops, heights, deviations, marker="o", markersize=4, capsize=3, linewidth=1, label=method)
    axes.set(xscale="log", xlabel="FLOPs, % of dense", ylabel="test accuracy, %", title="Fashion-MNIST")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    charts.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the four IDX files of Fashion-MNIST")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--targets", nargs="*", type=float, default=[0.9, 0.95, 0.99])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RUNS.path)
    parser.add_argument("--picture", type=Path, help="draw the front of all lines as SVG, run nothing")
    options = parser.parse_args()
    held = RunFile(options.output, RUNS.key)
    if options.picture:
        lines = held.read()
        if not lines:
            parser.error(f"{held.path} has no runs to draw")
        picture(lines, options.picture)
        return
    torch.set_num_threads(options.threads)
    data = load("fashion-mnist", options.data_dir)
    wanted = (
        {"method": method, "target": 0.0 if method == "dense" else target, "seed": seed}
        for target in options.targets
        for seed in options.seeds
        for method in options.methods
    )
    for run in held.missing(wanted):
        result = train(**run, data=data, epochs=options.epochs)
        held.append(result | {"machine": machine()})
        print("{method:30s} {target} seed {seed}: {accuracy:.4f}, FLOPs {flops:.4f}".format(**result))


if __name__ == "__main__":
    main()
