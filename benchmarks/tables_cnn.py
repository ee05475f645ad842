"""Tables of the convolutional networks: the demo and the studies."""

from statistics import mean
from typing import Any

from benchmarks.documents import EXACT_BUDGETS, lines, markdown, results, spread, table


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


@table("exact-budgets", EXACT_BUDGETS)
@table("exact-budgets")
def exact_budgets() -> str:
    """Methods at each sparsity, beside the dense network of the same recipe."""
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
    """Accuracy and FLOPs of every variant of the screen, the best at 99 % first; bold where no run beats both."""
    targets = (0.9, 0.95, 0.99)
    runs = lines("exact_budgets_screen.jsonl")
    grouped: dict[str, dict[float, dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(run["variant"], {})[run["target"]] = run
    dense = grouped.pop("dense", {}).get(0.0)
    front, best = [], 0.5  # collapsed runs are on no front, whatever they save
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
