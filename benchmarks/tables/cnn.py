"""Tables of the convolutional networks: the demo and the studies."""

from statistics import mean
from typing import Any

from benchmarks.tables.documents import (
    EXACT_BUDGETS,
    FINETUNING,
    METHODS_STUDY,
    NONE,
    lines,
    markdown,
    results,
    spread,
    table,
)


@table("demo")
def demo() -> str:
    runs = sorted(results("demo-*.json"), key=lambda run: run["seed"])
    rows = [
        [
            str(run["seed"]),
            f"{100 * run['accuracy']:.2f}",
            f"{100 * run['sparsity']:.3f}",
            f"{run['nonzeros']:,} of {run['params']:,}",
            f"{100 * run['flops'] / run['dense_flops']:.1f}",
            f"{run['seconds']:.0f}",
        ]
        for run in runs
    ]
    return markdown(["seed", "accuracy %", "sparsity %", "weights left", "FLOPs, % of dense", "seconds"], rows)


@table("batch-norm-lag", EXACT_BUDGETS)
def batch_norm_lag() -> str:
    """Return the accuracy lost by lagging statistics, as maximum and mean over the epochs."""
    rows = []
    for name, epochs in results("batch_norm_lag.json")[0]["runs"].items():
        row = [f"str-exact, a solve {name}" if name.startswith("every") else name]
        for statistics in ("running", "20 batches"):
            gaps = [100 * (epoch["all batches"] - epoch[statistics]) for epoch in epochs]
            worst = max(range(len(gaps)), key=gaps.__getitem__)
            row += [f"{gaps[worst]:.1f} (epoch {epochs[worst]['epoch']})", f"{mean(gaps):.1f}"]
        rows.append(row)
    header = ["method", "running averages: largest gap", "mean gap", "20 batches: largest gap", "mean gap"]
    return markdown(header, rows)


@table("exact-budgets", EXACT_BUDGETS)
def exact_budgets() -> str:
    """Return the results of methods at each sparsity, and of the dense network of the same recipe."""
    runs = lines("exact_budgets.jsonl")
    dense = [run["accuracy"] for run in runs if run["method"] == "dense"]
    rows = []
    for target, method in sorted({(run["target"], run["method"]): None for run in runs}, key=lambda key: key[0]):
        chosen = [run for run in runs if (run["target"], run["method"]) == (target, method)]
        accuracies = [run["accuracy"] for run in chosen]
        behind = f"{100 * (mean(accuracies) - mean(dense)):+.2f}" if target and dense else ""
        flops = spread((run["flops"] for run in chosen), 100)
        rows.append(
            [method, f"{100 * target:g}", spread(accuracies, 100), behind, flops if target else "100", str(len(chosen))]
        )
    return markdown(["method", "sparsity %", "accuracy %", "points to dense", "FLOPs, % of dense", "seeds"], rows)


@table("screen", EXACT_BUDGETS)
def screen_table() -> str:
    """Return accuracy and FLOPs of all variants of the screen, the best at 99 % first. The Pareto front is bold."""
    targets = (0.9, 0.95, 0.99)
    runs = lines("exact_budgets_screen.jsonl")
    grouped: dict[str, dict[float, dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(run["variant"], {})[run["target"]] = run
    dense = grouped.pop("dense", {}).get(0.0)
    front, best = [], 0.5  # collapsed runs do not count for the front
    for run in sorted((run for run in runs if run["target"]), key=lambda run: (run["flops"], -run["accuracy"])):
        if run["accuracy"] > best:
            front.append(run)
            best = run["accuracy"]

    def cell(run: dict[str, Any] | None) -> str:
        text = f"{100 * run['accuracy']:.2f} ({100 * run['flops']:.2f})" if run else ""
        return f"**{text}**" if run in front else text

    order = sorted(grouped, key=lambda name: -grouped[name].get(0.99, {"accuracy": 0})["accuracy"])
    rows = [[name, *(cell(grouped[name].get(target)) for target in targets)] for name in order]
    if dense:
        rows.insert(0, ["dense", *[cell(dense)] * len(targets)])
    return markdown(["variant", *(f"{100 * t:g} %: accuracy (FLOPs)" for t in targets)], rows)


@table("tf-arithmetic", FINETUNING)
def tf_arithmetic() -> str:
    """Return the accuracy of TensorFlow's weights with each arithmetic."""
    rows = [
        [name, *(f"{100 * accuracy[top]:.1f}" for top in ("top1", "top5"))]
        for name, accuracy in results("tf_arithmetic.json")[0]["variants"].items()
    ]
    return markdown(["activation, padding, epsilon", "top-1 %", "top-5 %"], rows)


@table("distributions", EXACT_BUDGETS)
def distributions() -> str:
    """Return the results of the rules for distributions at equal FLOPs and at equal sparsity, the best first."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for run in lines("distributions.jsonl"):
        groups.setdefault((run["unit"], run["target"], run["variant"]), []).append(run)
    rows = []
    for (unit, target, name), runs in sorted(
        groups.items(), key=lambda group: (*group[0][:2], -mean(run["accuracy"] for run in group[1]))
    ):
        goal = f"{100 * (1 - target):.3g} % of the FLOPs" if unit == "FLOPs" else f"{100 * target:.3g} % zeros"
        rows.append(
            [
                f"{goal}, {name}",
                spread((run["accuracy"] for run in runs), 100),
                f"{100 * mean(run['sparsity'] for run in runs):.2f}",
                f"{100 * mean(run['flops'] for run in runs):.2f}",
                str(len(runs)),
            ]
        )
    return markdown(["target, rule", "accuracy %", "sparsity %", "FLOPs, % of dense", "seeds"], rows)


METHODS = (
    "str-exact",
    "str-exact, FLOP-aware",
    "str",
    "gmp, global",
    "gmp, budget of str-exact",
    "dnw, ERK",
    "dnw, budget of str-exact",
    "rigl, ERK",
)


@table("methods", METHODS_STUDY)
def methods() -> str:
    """Return the results of the methods at each sparsity, and of the dense network."""
    return _by_sparsity([run for run in lines("methods.jsonl") if run["line"] in ("dense", *METHODS)])


@table("methods-ways", METHODS_STUDY)
def methods_ways() -> str:
    """Return the results of other distributions of zeros, other gradients, and fine-tuning."""
    return _by_sparsity([run for run in lines("methods.jsonl") if run["line"] not in ("dense", *METHODS)])


@table("gradients", METHODS_STUDY)
def gradients() -> str:
    """Return str-exact's accuracy with three gradients of the pruned weights, on all data where they were measured."""
    usual, throughout = "str-exact", "str-exact, straight-through"
    studies = {
        "Fashion-MNIST": ("methods", lines("methods.jsonl"), ""),
        "Fashion-MNIST, fine-tuned for 0.4 epochs": ("methods", lines("methods.jsonl"), ", fine-tuned 0.4"),
        "Fashion-MNIST, fine-tuned for 1 epoch": ("methods", lines("methods.jsonl"), ", fine-tuned 1"),
        "CIFAR-10, ResNet20": ("cifar", lines("cifar.jsonl"), ""),
        "CIFAR-10, ResNet20, with a teacher": ("cifar", lines("cifar.jsonl"), ", teacher"),
        "Caltech-101, fine-tuned": ("caltech", lines("caltech.jsonl"), ""),
    }
    faded, rows = lines("fading_gradient.jsonl"), []
    for name, (study, runs, end) in studies.items():
        runs = [run for run in runs if run.get("model", "resnet20") == "resnet20"]
        for target in sorted({run["target"] for run in runs if run["line"] == throughout + end}):
            chosen = [
                [run for run in runs if (run["line"], run["target"]) == (usual + end, target)],
                [run for run in faded if (run["study"], run["line"], run["target"]) == (study, usual + end, target)],
                [run for run in runs if (run["line"], run["target"]) == (throughout + end, target)],
            ]
            cells = [spread((run["accuracy"] for run in own), 100) if own else NONE for own in chosen]
            numbers = ", ".join(str(len(own)) for own in chosen)
            rows.append([f"{name}, {100 * float(target):g} %", *cells, numbers])
    header = ["data, zeros", "switched (default)", "fading", "throughout", "seeds"]
    return markdown(header, rows)


@table("methods-lambda", METHODS_STUDY)
def methods_lambda() -> str:
    """Return the results of the bisection of lambda."""
    rows = [
        [f"{run['weight_decay']:.2e}", f"{100 * run['sparsity']:.2f}", f"{100 * run['accuracy']:.2f}"]
        for run in sorted(lines("methods_lambda.jsonl"), key=lambda run: run["weight_decay"])
    ]
    return markdown(["lambda", "sparsity %", "accuracy %"], rows)


def _by_sparsity(runs: list[dict[str, Any]]) -> str:
    """Return a line's accuracy and FLOPs in % of dense, by sparsity, with its sparsity if it has no target."""
    targets = sorted({run["target"] for run in runs} - {0.0})
    seeds = max(len({run["seed"] for run in runs if run["line"] == line}) for line in {run["line"] for run in runs})

    def cell(line: str, target: float) -> str:
        chosen = [run for run in runs if (run["line"], run["target"]) == (line, target)]
        if not chosen:
            return ""
        text = f"{spread((run['accuracy'] for run in chosen), 100)} ({100 * mean(r['flops'] for r in chosen):.1f})"
        reached = 100 * mean(run["sparsity"] for run in chosen)
        text += f" at {reached:.2f} %" if abs(reached - 100 * target) > 0.02 else ""
        return text + ("" if len(chosen) in (1, seeds) else f" [{len(chosen)} seeds]")

    rows = []
    order = {line: place for place, line in enumerate(("dense", *METHODS))}
    for line in sorted({run["line"] for run in runs}, key=lambda line: (order.get(line, len(order)), line)):
        dense = [run["accuracy"] for run in runs if run["line"] == line == "dense"]
        rows.append([line, *([spread(dense, 100)] * len(targets) if dense else [cell(line, t) for t in targets])])
    return markdown(["method", *(f"{100 * target:g} %" for target in targets)], rows)
