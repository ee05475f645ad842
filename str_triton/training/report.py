"""report.html: one file that shows what a run did, made from the files of its folder."""

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from str_triton.budget.budget import Budget
from str_triton.training.metrics import read_metrics
from str_triton.training.pictures import (
    flops_picture,
    progress_picture,
    size_picture,
    size_text,
    sparsity_picture,
    threshold_picture,
)

STYLE = """
:root { color-scheme: light dark; --line: #d8dce1; --faint: #5f6872; --card: #f6f7f9; --text: #1c2229; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #353c45; --faint: #9aa5b1; --card: #1c2128; --text: #e3e8ee; --page: #13171c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .75rem; margin-top: 1.5rem; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; }
.facts b { display: block; font-size: 1.3rem; line-height: 1.3; white-space: nowrap; }
.facts span { color: var(--faint); font-size: .85rem; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
table.plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.plain td:first-child { width: 14rem; color: var(--faint); }
"""


def report(folder: Path) -> str:
    """The page of a finished run, with everything in it: pictures, tables, style.

    Reads summary.json, config.json, environment.json, metrics.jsonl and budget.json of ``folder``.
    """
    summary, config, environment = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "config", "environment")
    )
    budget = Budget.from_json(folder / "budget.json")
    epochs = [record for record in read_metrics(folder) if record["kind"] == "epoch"]
    title = f"{summary['recipe']}: {100 * summary['accuracy']:.2f} % accuracy at {100 * budget.sparsity:.2f} % sparsity"
    thresholds = threshold_picture(epochs, budget)
    sections = [
        _section("Accuracy and sparsity over time", progress_picture(epochs)),
        _section("Sparsity by layer", sparsity_picture(budget)),
        _section("Thresholds over time", thresholds) if thresholds else "",
        _section(
            "FLOPs by layer", flops_picture(budget), "Grey: dense. Blue: with the zeros left out, and as a share."
        ),
        _section("Size of the weights", size_picture(budget)),
        _section("Budget", _budget_table(budget)),
        _section("Configuration", _plain_table(config)),
        _section("Environment", _plain_table(environment)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(_subtitle(config))}</p>\n{_facts(summary, budget)}\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _subtitle(config: Mapping[str, Any]) -> str:
    keys = ("data", "model", "method", "seed")
    return ", ".join(f"{key} {config[key]}" for key in keys if key in config)


def _facts(summary: Mapping[str, Any], budget: Budget) -> str:
    sparse = 4 * budget.nonzeros + budget.params / 8
    facts = {
        "test accuracy": f"{100 * summary['accuracy']:.2f} %",
        "sparsity": f"{100 * budget.sparsity:.2f} %",
        f"of {budget.params:,} weights": f"{budget.nonzeros:,}",
        "of the dense FLOPs": f"{100 * budget.flops / budget.dense_flops:.1f} %",
        f"of {size_text(4 * budget.params)}": size_text(min(sparse, 4 * budget.params)),
        f"for {summary['epochs']} epochs": f"{summary['seconds']:.0f} s",
    }
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts.items())
    return f'<div class="facts">{cells}</div>'


def _section(heading: str, body: str, caption: str = "") -> str:
    words = f"<p>{caption}</p>\n" if caption else ""
    return f'<section>\n<h2>{heading}</h2>\n{words}<div class="wide">{body}</div>\n</section>'


def _budget_table(budget: Budget) -> str:
    heads = ("layer", "weights", "nonzero", "sparsity", "dense FLOPs", "FLOPs", "share", "threshold")
    lines = [_line("th", heads)]
    for name, row in [(row.name or "(model)", row) for row in budget.rows] + [("total", budget)]:
        threshold = getattr(row, "threshold", None)
        cells = (
            html.escape(name),
            f"{row.params:,}",
            f"{row.nonzeros:,}",
            f"{100 * row.sparsity:.2f} %" if row.params else "",
            f"{row.dense_flops:,}",
            f"{row.flops:,}",
            f"{100 * row.flops / row.dense_flops:.2f} %" if row.dense_flops else "",
            "" if threshold is None else f"{threshold:.4g}",
        )
        lines.append(_line("td", cells, "total" if row is budget else ""))
    return f"<table>{''.join(lines)}</table>"


def _plain_table(values: Mapping[str, Any]) -> str:
    rows = (_line("td", (html.escape(key), html.escape(_text(value)))) for key, value in values.items())
    return f'<table class="plain">{"".join(rows)}</table>'


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return "none" if value is None else str(value)


def _line(tag: str, cells: Iterable[str], kind: str = "") -> str:
    row = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
    return f'<tr class="{kind}">{row}</tr>' if kind else f"<tr>{row}</tr>"
