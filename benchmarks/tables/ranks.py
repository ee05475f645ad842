"""Tables of the studies of ranks on real data: HAR-2 and speech."""

from statistics import mean
from typing import Any

from benchmarks.tables.documents import lines, markdown, spread, table

Run = dict[str, Any]
# The paper's accuracies at (rank of W, rank of U): Kusupati et al., ICML 2020, table 3.
PAPER = {
    ("dense", None): "96.10",
    ("str-exact", "9,8"): "95.76 (STR)", ("fixed", "9,8"): "94.06",
    ("str-exact", "9,7"): "95.62 (STR)", ("fixed", "9,7"): "93.15",
    ("str-exact", "8,7"): "95.59 (STR)", ("fixed", "8,7"): "94.88",
}  # fmt: skip
NONE = "not measured"


def at_its_rate(runs: list[Run]) -> list[Run]:
    """Return the runs at the learning rate with the highest validation accuracy at the first seed."""
    first = [run for run in runs if run["job"]["seed"] == min(run["job"]["seed"] for run in runs)]
    rate = max(first, key=lambda run: run["validation_accuracy"])["job"]["rate"]
    return [run for run in runs if run["job"]["rate"] == rate]


def rates_tried(runs: list[Run]) -> str:
    """Return the chosen learning rate and the number of rates that were tried."""
    count = len({run["job"]["rate"] for run in runs})
    return f"{at_its_rate(runs)[0]['job']['rate']:g} of {count}"


@table("har-ranks")
def har_ranks() -> str:
    """Return accuracies on HAR-2 by method and ranks, at the number of epochs that most runs have."""
    runs = _main_study(lines("har_ranks.jsonl"))
    groups = [("dense", None), ("str", None)]
    groups += [(method, pair) for pair in ("9,8", "9,7", "8,7") for method in ("str-exact", "fixed", "svd-finetune")]
    rows = []
    for method, pair in groups:
        own = [run for run in runs if (run["job"]["method"], run["job"]["ranks"]) == (method, pair)]
        name = method if pair is None else f"{method}, size of ({pair})"
        paper = PAPER.get((method, pair), "")
        if not own:
            rows.append([name, "", "", NONE, "", "", "0", paper])
            continue
        chosen = at_its_rate(own)
        learned = sorted({f"({','.join(str(rank) for rank in run['ranks'].values())})" for run in chosen})
        rows.append(
            [
                name,
                "" if method == "dense" else " ".join(learned),
                f"{mean(run['params'] for run in chosen):,.0f}",
                spread((run["accuracy"] for run in chosen), 100),
                spread((run["validation_accuracy"] for run in chosen), 100),
                rates_tried(own),
                str(len(chosen)),
                paper,
            ]
        )
    header = ["method", "ranks", "parameters", "accuracy %", "validation %", "rate", "seeds", "paper, 300 epochs, %"]
    return markdown([f"{header[0]}; {runs[0]['job']['epochs']} epochs", *header[1:]], rows)


@table("speech-ranks")
def speech_ranks() -> str:
    """Return accuracies on speech by cell, compression and method, with parameters, multiply-adds and bytes in C."""
    runs = _main_study(lines("speech_ranks.jsonl"))
    rows = []
    for cell in ("gru", "lstm", "fastgrnn"):
        of_cell = [run for run in runs if run["job"]["cell"] == cell]
        if not of_cell:
            rows.append([cell, "", NONE, *[""] * 5, "0"])
        keys = sorted({(run["job"]["compression"] or 1, run["job"]["method"]) for run in of_cell})
        for compression, method in keys:
            own = [r for r in of_cell if (r["job"]["compression"] or 1, r["job"]["method"]) == (compression, method)]
            chosen = at_its_rate(own)
            counts = [
                f"{mean(run[name] for run in chosen):,.0f}" for name in ("params", "multiply_adds", "int8_weight_bytes")
            ]
            figures = [spread((run[name] for run in chosen), 100) for name in ("accuracy", "validation_accuracy")]
            rows.append(
                [f"{cell}, {method}", f"{compression:g}", *figures, *counts, rates_tried(own), str(len(chosen))]
            )
    header = ["compression", "accuracy %", "validation %", "parameters", "multiply-adds a step", "int8 bytes in C"]
    return markdown([f"cell, method; {runs[0]['job']['epochs']} epochs", *header, "rate", "seeds"], rows)


def _main_study(runs: list[Run]) -> list[Run]:
    """Return the runs with the number of epochs that most runs have."""
    epochs = [run["job"]["epochs"] for run in runs]
    most = max(sorted(set(epochs)), key=epochs.count)
    return [run for run in runs if run["job"]["epochs"] == most]
