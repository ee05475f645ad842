"""The documents' tables, made from benchmarks/results: python -m benchmarks.readme_tables [--check].

A table stands in the README between <!-- table:NAME --> and <!-- /table -->, and is the text that the function
registered as NAME returns. To add one: write that function, put the two markers where the table belongs, run this.
Tables of another document are registered with @table(NAME, document).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

EXACT_BUDGETS = ROOT / "docs" / "exact-budgets.md"
LEARNED_RANK = ROOT / "docs" / "learned-rank.md"
DOCUMENTS: dict[Path, dict[str, Callable[[], str]]] = {README: {}, EXACT_BUDGETS: {}, LEARNED_RANK: {}}
TABLES = DOCUMENTS[README]


class NotMeasured(Exception):
    """There is no result file for a table: the README says so in its place."""


def table(name: str, document: Path = README) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that returns a table's Markdown as the document's table `name`."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        DOCUMENTS[document][name] = function
        return function

    return register


def results(pattern: str) -> list[dict[str, Any]]:
    """The result files whose names match, in order; NotMeasured when there are none."""
    files = sorted(RESULTS.glob(pattern))
    if not files:
        raise NotMeasured(pattern)
    return [json.loads(file.read_text()) for file in files]


def lines(name: str) -> list[dict[str, Any]]:
    """The lines of a result file with a line per run; NotMeasured when it is absent or empty."""
    file = RESULTS / name
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not runs:
        raise NotMeasured(name)
    return runs


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers and stand to the right."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Iterable[float], scale: float = 1, digits: int = 2) -> str:
    """Mean ± sample standard deviation; a single value stands alone."""
    scaled = [value * scale for value in values]
    text = f"{mean(scaled):.{digits}f}"
    return f"{text} ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else text


# ---- the tables ---------------------------------------------------------------------------------------------------


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


@table("soft-threshold")
def soft_threshold() -> str:
    """The op against the literal formula and against a copy, by shape."""
    rows = []
    for run in results("soft_threshold_*.json"):
        for shape, figures in run["soft_threshold"].items():
            for gradient in ("masked", "straight_through"):
                literal = "literal" if gradient == "masked" else f"literal_{gradient}"
                rows.append(
                    [
                        f"{shape}, {gradient.replace('_', '-')}",
                        f"{figures[f'{gradient}_ms']:.2f}",
                        f"{figures[f'{literal}_ms']:.2f}",
                        f"{figures[f'{gradient}_speedup']:.2f}",
                        f"{100 * figures[f'{gradient}_share_of_copy']:.0f}",
                    ]
                )
    return markdown(["shape, gradient", "ms", "formula, ms", "times faster", "% of a copy's bytes/s"], rows)


@table("training-step")
def training_step() -> str:
    """A training step against the dense network's, by machine."""
    rows = []
    for run in results("training_step_*.json"):
        machine = run["machine"]
        device = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
        for name, seconds in run["seconds"].items():
            ratio = f"{run['ratio_to_dense'][name]:.3f}"
            rows.append([f"{name}, {device}", f"{1e3 * seconds:.1f}", ratio])
        solve, share = f"{1e3 * run['solve_seconds']:.1f}", f"{run['solve_share_of_dense_step']:.3f}"
        rows.append([f"a solve, every {run['solve_interval']} steps, {device}", solve, f"{share} a step"])
    return markdown(["ResNet-50, forward, backward and SGD", "ms", "x dense"], rows)


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


@table("rank-demo")
def rank_demo() -> str:
    """The low-rank demo's seeds, beside the dense network of the same recipe."""
    dense = {run["seed"]: run["accuracy"] for run in results("rank-demo-dense-seed-*.json")}
    rows = [
        [
            str(run["seed"]),
            f"{100 * run['accuracy']:.2f}",
            f"{100 * dense[run['seed']]:.2f}",
            ", ".join(str(rank) for name, rank in run["ranks"].items() if "hh" in name),
            str(sum(run["ranks"].values())),
            f"{run['params']:,} of {run['dense_params']:,}",
            f"{run['seconds']:.0f}",
        ]
        for run in results("rank-demo-seed-*.json")
    ]
    header = ["seed", "accuracy %", "dense %", "recurrent ranks", "all ranks", "parameters", "seconds"]
    return markdown(header, rows)


@table("low-rank-rnn")
def low_rank_rnn() -> str:
    """The recurrent layers against torch's, by machine."""
    rows = []
    for run in results("low_rank_rnn_cpu.json"):
        device = f"{run['machine']['processor']}, {run['machine']['threads']} threads"
        for row in run["rows"]:
            kind = "training step" if row["training"] else "inference"
            name = f"{row['cell'].upper().replace('FAST', 'Fast')}, {kind}, batch {row['batch_size']}, {device}"
            sizes = [f"{row['hidden_size']}", f"{row['rank']}"]
            times = [f"{row['ours_ms']:.1f}", f"{row['torch_ms']:.1f}", f"{row['torch_over_ours']:.2f}"]
            rows.append([name, *sizes, *times])
    return markdown(["cell", "hidden size", "rank", "ms", "torch, ms", "times faster"], rows)


@table("learned-rank", LEARNED_RANK)
@table("learned-rank")
def learned_rank() -> str:
    """Methods at equal parameters, by data set and compression, beside the whole dense network."""
    runs = lines("learned_rank.jsonl")
    rows = []
    for data in dict.fromkeys(run["data"] for run in runs):
        text = data == "text"
        key, scale, digits = ("bits_per_character", 1, 3) if text else ("accuracy", 100, 2)
        own = [run for run in runs if run["data"] == data]
        dense = mean(run[key] for run in own if run["method"] == "dense") * scale
        order = sorted({(run["compression"] or 0, run["method"]): None for run in own}, key=lambda pair: pair[0])
        for compression, method in order:
            chosen = [run for run in own if (run["compression"] or 0, run["method"]) == (compression, method)]
            figures = [run[key] for run in chosen]
            behind = f"{mean(figures) * scale - dense:+.{digits}f}" if compression else ""
            params = f"{mean(run['params'] for run in chosen):,.0f}"
            name = f"{data}, {method}" + (", bits per character" if text else "")
            size = f"{compression:g}" if compression else "1"
            rows.append([name, size, params, spread(figures, scale, digits), behind, str(len(chosen))])
    return markdown(["data, method", "compression", "parameters", "accuracy %", "to dense", "seeds"], rows)


@table("learned-rank-screen", LEARNED_RANK)
def learned_rank_screen() -> str:
    """Every variant at both total ranks: accuracy and loss on held-out training utterances."""
    runs = lines("learned_rank_screen.jsonl")
    ranks = sorted({run["total_rank"] for run in runs})
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        cells = []
        for rank in ranks:
            chosen = [run for run in runs if (run["variant"], run["total_rank"]) == (variant, rank)]
            accuracy, loss = spread((run["accuracy"] for run in chosen), 100, 1), mean(run["loss"] for run in chosen)
            cells += [accuracy, f"{loss:.3f}", f"{mean(run['params'] for run in chosen):,.0f}"]
        rows.append([variant, *cells])
    header = [f"{rank}: {name}" for rank in ranks for name in ("accuracy %", "loss", "parameters")]
    return markdown(["variant; total rank", *header], rows)


@table("learned-rank-tuning", LEARNED_RANK)
def learned_rank_tuning() -> str:
    """Validation loss of every method at every learning rate."""
    runs = lines("learned_rank_tuning.jsonl")
    rates = sorted({run["rate"] for run in runs})

    def cell(method: str, rate: float) -> str:
        losses = [run["validation_loss"] for run in runs if (run["method"], run["rate"]) == (method, rate)]
        return spread(losses, digits=3)

    methods = dict.fromkeys(run["method"] for run in runs)
    rows = [[method, *(cell(method, rate) for rate in rates)] for method in methods]
    return markdown(["method; rate", *(f"x {rate:g}" for rate in rates)], rows)


# ---- filling the documents -------------------------------------------------------------------------------------------


def fill(text: str, tables: dict[str, Callable[[], str]], document: str = "README.md") -> str:
    """`text` with every marked table made anew; ValueError when markers and tables do not correspond."""
    marked = [name for _, name, _ in MARKED.findall(text)]
    if sorted(marked) != sorted(tables) or len(marked) != text.count("<!-- table:"):
        raise ValueError(
            f"{document} marks the tables {sorted(marked)}, benchmarks/readme_tables.py has {sorted(tables)}"
        )

    def made(match: re.Match[str]) -> str:
        try:
            body = tables[match[2]]()
        except NotMeasured:
            body = "Not measured."
        return f"{match[1]}{body}\n{match[3]}"

    return MARKED.sub(made, text)


def main(arguments: list[str] | None = None) -> int:
    """Write the documents' tables, or with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    outdated = 0
    for document, tables in DOCUMENTS.items():
        old = document.read_text()
        new = fill(old, tables, document.name)
        if check and new != old:
            print(f"{document.name} is out of date: run python -m benchmarks.readme_tables", file=sys.stderr)
            outdated = 1
        elif new != old:
            document.write_text(new)
    return outdated


if __name__ == "__main__":
    sys.exit(main())
