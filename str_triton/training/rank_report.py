"""The parts of report.html for a low-rank network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from str_triton.budget.rank_budget import RankBudget
from str_triton.training.metrics import Record
from str_triton.training.page import pictures, section, table
from str_triton.training.pictures import size_text
from str_triton.training.rank_pictures import rank_picture, rank_progress_pictures, spectrum_pictures

SPECTRA = (
    "Each line is the singular value of a component after every epoch. Blue: kept at the end; grey: removed. "
    "Dashed: the threshold below which components are removed."
)


def low_rank_title(summary: Mapping[str, Any]) -> str:
    """Return the page's title, with the recipe, the network's accuracy and its size."""
    share = 100 * summary["params"] / summary["dense_params"]
    return f"{summary['recipe']}: {_figure(summary)} with {share:.1f} % of the dense parameters"


def low_rank_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the key figures on top of the page."""
    name = "test accuracy" if "accuracy" in summary else "test bits per character"
    figure = _figure(summary).removesuffix(" accuracy").removesuffix(" bits per character")
    dense = summary["dense_params"]
    facts = {
        name: figure,
        "components in all": f"{sum(summary['ranks'].values())}",
        f"of {dense:,} parameters": f"{summary['params']:,}",
        "of the dense parameters": f"{100 * summary['params'] / dense:.1f} %",
        f"of {size_text(4 * dense)} in float32": size_text(4 * summary["params"]),
        f"for {summary['epochs']} epochs": f"{summary['seconds']:.0f} s",
    }
    return facts if summary["ranks"] else {key: value for key, value in facts.items() if key != "components in all"}


def low_rank_sections(folder: Path, summary: Mapping[str, Any], epochs: Sequence[Record]) -> list[str]:
    """Return the sections with pictures and the table of matrices. The sections on ranks need factorized matrices."""
    budget = RankBudget.from_json(folder / "budget.json")
    name = "accuracy" if "accuracy" in summary else "bits_per_character"
    validated = summary[f"validation_{name}"] is not None
    label = "validation" if validated else "validation data, also trained on"
    sections = [section("Progress", pictures(*rank_progress_pictures(epochs, name, label)))]
    if budget.rows:
        sections += [
            section("Ranks over time", pictures(rank_picture(epochs, [row.name for row in budget.rows]))),
            section("Spectra over time", pictures(*spectrum_pictures(epochs, budget)), SPECTRA),
            section("Matrices", _matrix_table(budget)),
        ]
    return sections


def _figure(summary: Mapping[str, Any]) -> str:
    if "accuracy" in summary:
        return f"{100 * summary['accuracy']:.2f} % accuracy"
    return f"{summary['bits_per_character']:.3f} bits per character"


def _matrix_table(budget: RankBudget) -> str:
    heads = ("matrix", "rows", "columns", "rank", "of", "parameters", "dense", "share", "threshold")
    rows = [
        (
            row.name,
            f"{row.rows:,}",
            f"{row.columns:,}",
            str(row.rank),
            str(row.max_rank),
            f"{row.params:,}",
            f"{row.dense_params:,}",
            f"{100 * row.params / row.dense_params:.1f} %",
            "" if row.threshold is None else f"{row.threshold:.4g}",
        )
        for row in budget.rows
    ]
    if budget.other_params:
        others = f"{budget.other_params:,}"
        rows.append(("(other parameters)", "", "", "", "", others, others, "100.0 %", ""))
    share = f"{100 * budget.params / budget.dense_params:.1f} %"
    full = str(sum(row.max_rank for row in budget.rows))
    sums = (str(budget.total_rank), full, f"{budget.params:,}", f"{budget.dense_params:,}", share)
    return table(heads, rows, ("total", "", "", *sums, ""))
