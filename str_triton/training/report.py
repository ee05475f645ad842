"""report.html, a page about a finished run, made from the files of its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from str_triton.budget.budget import Budget
from str_triton.files import percent
from str_triton.training.metrics import Record, read_metrics
from str_triton.training.page import page, pictures, plain_table, section, table
from str_triton.training.pictures import (
    flops_picture,
    progress_pictures,
    size_picture,
    size_text,
    sparsity_picture,
    threshold_picture,
)
from str_triton.training.rank_report import low_rank_facts, low_rank_sections, low_rank_title


def report(folder: Path) -> str:
    """Return the page of a finished run as one file, with pictures, tables and style.

    Reads summary.json, config.json, environment.json, metrics.jsonl and budget.json of ``folder``, and data.json if it
    exists. A run whose summary has ranks is shown as a low-rank network, any other run as a sparse one.
    """
    summary, config, environment = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "config", "environment")
    )
    epochs = _epochs(folder)
    if "ranks" in summary:
        title, facts = low_rank_title(summary), low_rank_facts(summary)
        sections = low_rank_sections(folder, summary, epochs)
    else:
        budget = Budget.from_json(folder / "budget.json")
        title = (
            f"{summary['recipe']}: {100 * summary['accuracy']:.2f} % accuracy at {percent(budget.sparsity)} sparsity"
        )
        facts, sections = _facts(summary, budget), _sections(epochs, budget)
    if (folder / "data.json").exists():
        sections.append(section("Data", plain_table(json.loads((folder / "data.json").read_text()))))
    sections.append(section("Configuration", plain_table(config)))
    sections.append(section("Environment", plain_table(environment)))
    return page(title, _subtitle(config), facts, sections)


def _epochs(folder: Path) -> list[Record]:
    """Return the records of the epochs. Leave out those with other keys than the last one: a file may be edited."""
    epochs = [record for record in read_metrics(folder) if record["kind"] == "epoch"]
    return [record for record in epochs if record.keys() == epochs[-1].keys()]


def _subtitle(config: Mapping[str, Any]) -> str:
    keys = ("data", "model", "cell", "method", "seed")
    return ", ".join(f"{key} {config[key]}" for key in keys if key in config)


def _facts(summary: Mapping[str, Any], budget: Budget) -> dict[str, str]:
    sparse = 4 * budget.nonzeros + budget.params / 8
    return {
        "test accuracy": f"{100 * summary['accuracy']:.2f} %",
        "sparsity": percent(budget.sparsity),
        f"of {budget.params:,} weights": f"{budget.nonzeros:,}",
        "of the dense FLOPs": percent(budget.flops / budget.dense_flops, 1),
        f"of {size_text(4 * budget.params)}": size_text(min(sparse, 4 * budget.params)),
        f"for {summary['epochs']} epochs": f"{summary['seconds']:.0f} s",
    }


def _sections(epochs: list[Record], budget: Budget) -> list[str]:
    thresholds = threshold_picture(epochs, budget)
    dashed = f"Dashed: the whole network, {percent(budget.sparsity)}."
    flops = "Grey: dense. Blue: without the zeros; the number is the share of dense."
    size = "Blue: nonzeros in float32. Orange: one bit per weight, which says where they are. Grey: all in float32."
    return [
        section("Accuracy and sparsity over time", pictures(*progress_pictures(epochs))),
        section("Sparsity by layer", pictures(sparsity_picture(budget)), dashed),
        *([section("Thresholds over time", pictures(thresholds))] if thresholds else []),
        section("FLOPs by layer", pictures(flops_picture(budget)), flops),
        section("Size of the weights", pictures(size_picture(budget)), size),
        section("Budget", _budget_table(budget), " ".join(budget.remarks())),
    ]


def _budget_table(budget: Budget) -> str:
    heading, *lines, total = budget.lines()
    return table(heading, lines, total)
