"""The README's tables, made from benchmarks/results/*.json: python -m benchmarks.readme_tables [--check].

A table stands in the README between <!-- table:NAME --> and <!-- /table -->, and is the text that the function
registered as NAME returns. To add one: write that function, put the two markers where the table belongs, run this.
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

TABLES: dict[str, Callable[[], str]] = {}


class NotMeasured(Exception):
    """There is no result file for a table: the README says so in its place."""


def table(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that returns a table's Markdown as the README's table `name`."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = function
        return function

    return register


def results(pattern: str) -> list[dict[str, Any]]:
    """The result files whose names match, in order; NotMeasured when there are none."""
    files = sorted(RESULTS.glob(pattern))
    if not files:
        raise NotMeasured(pattern)
    return [json.loads(file.read_text()) for file in files]


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


# ---- filling the README -------------------------------------------------------------------------------------------


def fill(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """`text` with every marked table made anew; ValueError when markers and tables do not correspond."""
    marked = [name for _, name, _ in MARKED.findall(text)]
    if sorted(marked) != sorted(tables) or len(marked) != text.count("<!-- table:"):
        raise ValueError(
            f"README.md marks the tables {sorted(marked)}, benchmarks/readme_tables.py has {sorted(tables)}"
        )

    def made(match: re.Match[str]) -> str:
        try:
            body = tables[match[2]]()
        except NotMeasured:
            body = "Not measured."
        return f"{match[1]}{body}\n{match[3]}"

    return MARKED.sub(made, text)


def main(arguments: list[str] | None = None) -> int:
    """Write the README's tables, or with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    old = README.read_text()
    new = fill(old, TABLES)
    if check:
        if new != old:
            print("README.md is out of date: run python -m benchmarks.readme_tables", file=sys.stderr)
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
