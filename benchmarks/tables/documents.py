"""Tables for the documents: a registry of functions by document, reading of result files, Markdown.

A document has a table between the markers <!-- table:NAME --> and <!-- /table -->. Its text is the return value of the
function that is registered as NAME. A table without a result file is left out: nothing is between its markers. If the
function returns a whole section (`section`), the heading and the text are left out too.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.runs import RunFile

Run = dict[str, Any]  # a line of a result file
NONE = "not measured"
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
ALL_RESULTS = ROOT / "docs" / "results.md"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

EXACT_BUDGETS = ROOT / "docs" / "exact-budgets.md"
FINETUNING = ROOT / "docs" / "guides" / "finetuning.md"
LEARNED_RANK = ROOT / "docs" / "learned-rank.md"
METHODS_STUDY = ROOT / "docs" / "methods.md"
SPARSE_EXECUTION = ROOT / "docs" / "sparse-execution.md"
DOCUMENTS: dict[Path, dict[str, Callable[[], str]]] = {
    document: {}
    for document in (README, ALL_RESULTS, EXACT_BUDGETS, FINETUNING, LEARNED_RANK, METHODS_STUDY, SPARSE_EXECUTION)
}


class NotMeasured(Exception):
    """An error for a table without results. The document then leaves it out."""


def table(name: str, document: Path = ALL_RESULTS) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that returns Markdown as the document's table `name`."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        DOCUMENTS[document][name] = function
        return function

    return register


def results(pattern: str) -> list[dict[str, Any]]:
    """Return the result files whose names match, in order. Raise NotMeasured if there are none."""
    files = sorted(RESULTS.glob(pattern))
    if not files:
        raise NotMeasured(pattern)
    return [json.loads(file.read_text()) for file in files]


def lines(name: str) -> list[dict[str, Any]]:
    """Return the lines of a result file with a line per run. Raise NotMeasured if it is missing or empty."""
    runs = RunFile(RESULTS / name).read()
    if not runs:
        raise NotMeasured(name)
    return runs


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table. The first column is text, the others are numbers, aligned to the right."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Iterable[float], scale: float = 1, digits: int = 2) -> str:
    """Return mean ± sample standard deviation as text that no line breaks; for a single value only the value."""
    scaled = [value * scale for value in values]
    text = f"{mean(scaled):.{digits}f}"
    return f"{text}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{stdev(scaled):.{digits}f}" if len(scaled) > 1 else text


def behind(runs: list[Run], dense: list[Run]) -> str:
    """Return the points of accuracy of runs to those of the dense network."""
    if not dense:
        return NONE
    return f"{100 * (mean(run['accuracy'] for run in runs) - mean(run['accuracy'] for run in dense)):+.2f}"


def section(heading: str, text: str, table: str) -> str:
    """Return a part of a document: a heading, a paragraph, which is wrapped, and a table."""
    return f"{heading}\n\n{paragraph(text)}\n\n{table}"


def paragraph(text: str) -> str:
    """Return a text wrapped to the documents' width."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def seeds(number: int) -> str:
    """Return a number of seeds for people."""
    return "one seed" if number == 1 else str(number)


def fill(text: str, tables: dict[str, Callable[[], str]], document: str = "README.md") -> str:
    """Replace every marked table in `text`. Raise ValueError if markers and tables do not correspond."""
    marked = [name for _, name, _ in MARKED.findall(text)]
    if sorted(marked) != sorted(tables) or len(marked) != text.count("<!-- table:"):
        raise ValueError(f"{document} marks the tables {sorted(marked)}, the scripts have {sorted(tables)}")

    def made(match: re.Match[str]) -> str:
        try:
            return f"{match[1]}{tables[match[2]]()}\n{match[3]}"
        except NotMeasured:
            return f"{match[1]}{match[3]}"

    return MARKED.sub(made, text)


def counted(threads: int) -> str:
    """Return a number of threads for people."""
    return "1 thread" if threads == 1 else f"{threads} threads"
