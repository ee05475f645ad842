"""The methods of cnn/train.py side by side on Fashion-MNIST: accuracy and FLOPs at equal sparsity.

    python -m benchmarks.studies.methods --data-dir DIR [--lines ...] [--targets 0.9 0.95 0.98 0.99] [--seeds 0 1 2]
    python -m benchmarks.studies.methods --picture FILE

Appends a line per run to benchmarks/results/methods.jsonl and skips runs that it already holds. All lines share the
network, the 60,000 images (without augmentation), their order, the optimizer and the number of epochs. Sparsity counts
all weights, including those of the first and the last layer.

`str`, the paper's method, has no target. Its lambda, the weight decay of weights and thresholds, is found by bisection
with the first seed, until the number of remaining weights is within a tenth of the target's. methods_lambda.jsonl holds
the trials. The other seeds take the nearest lambda. "budget of str-exact" gives another method the layers' sparsities
of str-exact with the same seed and target. "fine-tuned" starts from the trained dense network of the same seed and
takes the number of epochs in its name.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import charts
from benchmarks.runs import Run, RunFile
from benchmarks.studies.cnn_runs import THROUGHOUT
from benchmarks.studies.exact_budgets import IMAGE, WEIGHT_DECAY, fit, measured, network, sgd
from benchmarks.timing import RESULTS, machine
from str_triton import count
from str_triton.cnn.config import Config
from str_triton.cnn.data import load
from str_triton.cnn.methods import Masked, prepare
from str_triton.cnn.recipes import resolve

WIDTHS, EPOCHS = (16, 32, 64), 4
LINES: dict[str, dict] = {
    "dense": {"method": "dense"},
    "str-exact": {"method": "str-exact"},
    "str-exact, masked": {"method": "str-exact", "gradient": "masked"},
    **{f"str-exact, switched at {100 * until:g} %": {"method": "str-exact", "until": until} for until in (0.35, 0.7)},
    THROUGHOUT: {"method": "str-exact", "gradient": "straight_through"},
    f"{THROUGHOUT}, FLOP-aware": {"method": "str-exact", "gradient": "straight_through", "distribution": "flop-aware"},
    f"{THROUGHOUT}, learned": {"method": "str-exact", "gradient": "straight_through", "distribution": "learned"},
    "str-exact, FLOP-aware": {"method": "str-exact", "distribution": "flop-aware"},
    "str-exact, learned": {"method": "str-exact", "distribution": "learned"},
    "str": {"method": "str"},
    "gmp, uniform": {"method": "gmp", "distribution": "uniform"},
    "gmp, ERK": {"method": "gmp", "distribution": "erk"},
    "gmp, global": {"method": "gmp", "distribution": "global"},
    "gmp, budget of str-exact": {"method": "gmp", "budget": "str-exact"},
    "dnw, uniform": {"method": "dnw", "distribution": "uniform"},
    "dnw, ERK": {"method": "dnw", "distribution": "erk"},
    "dnw, budget of str-exact": {"method": "dnw", "budget": "str-exact"},
    "rigl, ERK": {"method": "rigl", "distribution": "erk"},
    "rigl, uniform": {"method": "rigl", "distribution": "uniform"},
    **{
        f"{name}, fine-tuned {epochs:g}": options | {"epochs": epochs, "lr": 0.05}
        for epochs in (0.4, 1.0)
        for name, options in (
            ("str-exact", {"method": "str-exact"}),
            (THROUGHOUT, {"method": "str-exact", "gradient": "straight_through"}),
            ("gmp, global", {"method": "gmp", "distribution": "global"}),
        )
    },
    **{
        f"str-exact, fine-tuned 0.4, lr {lr:g}": {"method": "str-exact", "epochs": 0.4, "lr": lr} for lr in (0.1, 0.025)
    },
}
# The lines of docs/methods.svg.
DRAWN = ("dense", "str-exact", "str-exact, FLOP-aware", "str", "gmp, global", "dnw, ERK", "rigl, ERK")
RUNS = RunFile(RESULTS / "methods.jsonl", ("line", "target", "seed"))
TRIALS = RunFile(RESULTS / "methods_lambda.jsonl", ("weight_decay",))
LAMBDAS, TRIALS_AT_MOST = (1e-4, 1e-2), 6


class Nothing:
    """A controller that does nothing, for methods without a target."""

    def step(self, progress: float) -> None:
        pass


def names_of_layers() -> list[str]:
    return [row.name for row in count(network(WIDTHS), IMAGE).covered_rows]


def train(
    data,
    seed: int,
    *,
    target: float = 0.0,
    epochs: float = EPOCHS,
    lr: float = 0.1,
    weight_decay: float = WEIGHT_DECAY,
    start: dict | None = None,
    density: list[float] | None = None,
    until: float | None = None,
    **options,
) -> tuple[nn.Module, dict]:
    """Train once and return the model and its results.

    Args:
        start: the weights to start from.
        density: the density of each layer, as a budget.
        until: the progress until which the gradient of str-exact is straight-through, if it is not the default.
    """
    torch.manual_seed(seed)
    model = network(WIDTHS)
    if start is not None:
        model.load_state_dict(start)
    model.to(memory_format=torch.channels_last)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        if density is not None:
            shares = {name: 100 * (1 - d) for name, d in zip(names_of_layers(), density, strict=True)}
            Path(file.name).write_text(json.dumps(shares))
            options["budget"] = file.name
        elif options["method"] not in ("dense", "str"):
            options["target_sparsity"] = target
        config = resolve(Config(recipe="methods", weight_decay=weight_decay, **options))
        pruner = prepare(config, model, IMAGE)
    if until is not None:
        pruner.straight_through_until = until
    optimizer, begin = sgd(model, lr, weight_decay), time.perf_counter()
    if isinstance(pruner, Masked):
        pruner.attach(optimizer)
    fit(model, pruner or Nothing(), optimizer, data, seed, epochs)
    run = {"target": target, "seed": seed, "images": len(data.train), "epochs": epochs, "weight_decay": weight_decay}
    run |= measured(model, data, seed) | {"seconds": time.perf_counter() - begin}
    return model, run


def dense_network(data, seed: int) -> dict[str, torch.Tensor]:
    """Train the dense network and return its state dict."""
    return train(data, seed, **LINES["dense"])[0].state_dict()


def append(held: RunFile, run: Run) -> None:
    held.append(run | {"machine": machine()})
    print("{line:32s} {target} seed {seed}: {accuracy:.4f}, FLOPs {flops:.4f}".format(**run))


def trial_near(target: float, data) -> dict:
    """Run trials with the first seed as needed, and return the one whose sparsity is nearest to the target."""
    for _ in range(TRIALS_AT_MOST):
        trials = TRIALS.read()
        near = min(trials, key=lambda run: abs(run["sparsity"] - target), default=None)
        if near and abs(near["sparsity"] - target) <= 0.1 * (1 - target):
            break
        low = max((r["weight_decay"] for r in trials if r["sparsity"] < target), default=LAMBDAS[0])
        high = min((r["weight_decay"] for r in trials if r["sparsity"] >= target), default=LAMBDAS[1])
        _, run = train(data, 0, method="str", weight_decay=math.sqrt(low * high))
        append(TRIALS, {"line": "str", **run, "target": target})
    return min(TRIALS.read(), key=lambda run: abs(run["sparsity"] - target))


def run_line(line: str, target: float, seed: int, data, dense: Callable[[int], dict]) -> dict | None:
    """Run one line. Return None if it needs the result of another line that is missing."""
    options = dict(LINES[line])
    if options["method"] == "str":
        trial = trial_near(target, data)
        if trial["seed"] == seed:
            return trial | {"target": target}
        options["weight_decay"] = trial["weight_decay"]
    if "budget" in options:
        source = (options.pop("budget"), target, seed)
        found = [run for run in RUNS.read() if (run["line"], run["target"], run["seed"]) == source]
        if not found:
            return None
        options["density"] = found[0]["density"]
    if "fine-tuned" in line:
        options["start"] = dense(seed)
    return {"line": line, **train(data, seed, target=target, **options)[1]}


def picture(runs: list[dict], path: Path, shown: list[str]) -> None:
    """Draw accuracy against FLOPs, and the density of each layer at two sparsities, as SVG, as means over the seeds."""
    figure, (front, layers) = charts.new("methods", 2)
    names = names_of_layers()
    for line in shown:
        mine = [run for run in runs if run["line"] == line]
        points = [[run for run in mine if run["target"] == t] for t in sorted({run["target"] for run in mine})]
        if line == "dense":
            front.axhline(100 * average(points[0], "accuracy"), color="grey", linestyle="--", label="dense")
            continue
        flops = [100 * average(point, "flops") for point in points]
        front.plot(flops, [100 * average(p, "accuracy") for p in points], marker="o", markersize=4, label=line)
        sparse = [run for run in mine if run["target"] == 0.98]
        if sparse:
            density = [100 * sum(run["density"][i] for run in sparse) / len(sparse) for i in range(len(names))]
            layers.plot(range(len(names)), density, marker="o", markersize=4, label=line)
    front.set(xscale="log", xlabel="FLOPs, % of dense", ylabel="test accuracy, %", title="Fashion-MNIST")
    front.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    front.minorticks_off()
    layers.set(yscale="log", ylabel="weights left, %", title="by layer, at 98 %")
    layers.set_xticks(range(len(names)), [f"layer {i + 1}" for i in range(len(names))], rotation=30)
    for axes in (front, layers):
        axes.grid(alpha=0.3)
    front.legend(fontsize="small")
    charts.save(figure, path)


def average(runs: list[dict], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the four IDX files of Fashion-MNIST")
    parser.add_argument("--lines", nargs="*", choices=list(LINES), metavar="LINE", help="all, or those that are drawn")
    parser.add_argument("--targets", nargs="*", type=float, default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="draw the lines that were measured as SVG, run nothing")
    options = parser.parse_args()
    if options.picture:
        runs = RUNS.read()
        drawn = options.lines or DRAWN
        picture(runs, options.picture, [line for line in drawn if any(run["line"] == line for run in runs)])
        return
    torch.set_num_threads(options.threads)
    data = load("fashion-mnist", options.data_dir)

    dense = cache(partial(dense_network, data))
    wanted = (
        {"line": line, "target": 0.0 if line == "dense" else target, "seed": seed}
        for seed in options.seeds
        for target in options.targets
        for line in options.lines or LINES
    )
    for job in RUNS.missing(wanted):
        run = run_line(**job, data=data, dense=dense)
        if run is not None:
            append(RUNS, run)


if __name__ == "__main__":
    main()
