"""The cost of a model, layer by layer: the numbers, a table for people, and CSV and JSON files for programs."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Self

from str_triton.budget.table_files import (
    aligned,
    check_totals,
    flag,
    number,
    read_csv,
    read_json,
    require_record,
    write_csv,
    write_json,
)
from str_triton.files import percent

COLUMNS = ("name", "params", "nonzeros", "sparsity", "dense_flops", "flops", "threshold")
TOTALS = ("params", "nonzeros", "sparsity", "dense_flops", "flops")
# Columns that older files lack.
NEW_COLUMNS, NEW_TOTALS = ("covered",), ("uncovered_params", "uncovered_nonzeros", "total_sparsity")
HEADINGS = ("layer", "weights", "nonzeros", "sparsity", "dense FLOPs", "FLOPs", "threshold")


@dataclass(frozen=True)
class LayerBudget:
    """One weight and what it costs.

    Attributes:
        name: the layer's name in `model.named_modules()`, followed by the attribute unless that is "weight".
        params: elements of the weight.
        nonzeros: elements of the weight that are not zero.
        dense_flops: multiply-adds if no element were zero; `dense_flops / params` is how often each element is used.
        flops: multiply-adds with elements that are not zero.
        threshold: the layer's threshold; the mean if it has many, `None` if it has none.
        covered: whether `sparsify` knows this kind of weight.
    """

    name: str
    params: int
    nonzeros: int
    dense_flops: int
    flops: int
    threshold: float | None = None
    covered: bool = True

    @property
    def sparsity(self) -> float:
        """Share of the weight's elements that are zero, 0 to 1; 0 for a row without a weight."""
        return _sparsity(self.params, self.nonzeros)


@dataclass(frozen=True)
class Budget:
    """The cost of a model: `rows`, one per weight in the model's order, and their totals.

    `str(budget)` is a table. The files hold every number exactly: reading returns an equal budget.
    """

    rows: list[LayerBudget]

    @property
    def covered_rows(self) -> list[LayerBudget]:
        """The rows of the covered weights, which a target in weights counts; without the average pools."""
        return [row for row in self.rows if row.covered and row.params]

    @property
    def uncovered_rows(self) -> list[LayerBudget]:
        """The rows of the weights that are not covered."""
        return [row for row in self.rows if not row.covered and row.params]

    @property
    def params(self) -> int:
        """Number of covered weights, thresholded or left dense; a shared weight counts once."""
        return sum(row.params for row in self.covered_rows)

    @property
    def nonzeros(self) -> int:
        """Number of covered weights that are not zero."""
        return sum(row.nonzeros for row in self.covered_rows)

    @property
    def sparsity(self) -> float:
        """Share of the covered weights that is zero, 0 to 1."""
        return _sparsity(self.params, self.nonzeros)

    @property
    def uncovered_params(self) -> int:
        """Number of weights that are not covered."""
        return sum(row.params for row in self.uncovered_rows)

    @property
    def uncovered_nonzeros(self) -> int:
        """Number of weights that are neither covered nor zero."""
        return sum(row.nonzeros for row in self.uncovered_rows)

    @property
    def total_sparsity(self) -> float:
        """Share of all weights, covered or not, that is zero, 0 to 1."""
        return _sparsity(self.params + self.uncovered_params, self.nonzeros + self.uncovered_nonzeros)

    @property
    def dense_flops(self) -> int:
        """Multiply-adds of the counted forward pass, with covered weights and others, if no weight were zero."""
        return sum(row.dense_flops for row in self.rows)

    @property
    def flops(self) -> int:
        """Multiply-adds of the counted forward pass, with covered weights and others, that are not zero."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        return "\n".join([aligned(self.lines(), totals=2 if self.uncovered_rows else 1), *self.remarks()])

    def lines(self) -> list[tuple[str, ...]]:
        """Return the table's cells: a heading, a line per row, and the total, or one of the covered rows and of all."""
        body = [_cells(_label(row), row) for row in self.rows]
        if not self.uncovered_rows:
            return [HEADINGS, *body, _cells("total", self)]
        covered = Budget([row for row in self.rows if row.covered])
        all_rows = Budget([replace(row, covered=True) for row in self.rows])
        return [HEADINGS, *body, _cells("total, covered", covered), _cells("total", all_rows)]

    def remarks(self) -> list[str]:
        """Return the lines below the table: how many weights are not covered."""
        if not self.uncovered_rows:
            return []
        number = len(self.uncovered_rows)
        share = self.uncovered_params / (self.params + self.uncovered_params)
        return [
            f"not covered: {number} {'matrix' if number == 1 else 'matrices'}, {percent(share)} of all weights; "
            f"sparsity {percent(self.sparsity)} of the covered weights, {percent(self.total_sparsity)} of all"
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line per row under a heading; an absent threshold is an empty cell."""
        write_csv(path, COLUMNS + NEW_COLUMNS, map(_record, self.rows))

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_csv` wrote; further columns are left aside.

        Raises `ValueError` that names the file and the column where the file is damaged or lacks a column.
        """
        return cls([_parse(record, where) for record, where in read_csv(path, COLUMNS)])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the totals by name, and `rows` as a list of objects."""
        write_json(path, self._totals(), map(_record, self.rows))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_json` wrote; further keys are left aside.

        Raises `ValueError` that names the file and the column where the file is damaged or lacks a column.
        """
        content, records = read_json(path, TOTALS)
        budget = cls([_parse(record, where) for record, where in records])
        check_totals(path, content, {key: total for key, total in budget._totals().items() if key in content})
        return budget

    def _totals(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in TOTALS + NEW_TOTALS}


def _sparsity(params: int, nonzeros: int) -> float:
    return 1.0 - nonzeros / params if params else 0.0


def _label(row: LayerBudget) -> str:
    return (row.name or "(model)") + ("" if row.covered else " (not covered)")


def _cells(name: str, counts: LayerBudget | Budget) -> tuple[str, ...]:
    threshold = getattr(counts, "threshold", None)
    return (
        name,
        f"{counts.params:,}",
        f"{counts.nonzeros:,}",
        percent(counts.sparsity) if counts.params else "",
        f"{counts.dense_flops:,}",
        f"{counts.flops:,}",
        "" if threshold is None else f"{threshold:.4g}",
    )


def _record(row: LayerBudget) -> dict[str, Any]:
    return {column: getattr(row, column) for column in COLUMNS + NEW_COLUMNS}


def _parse(record: Any, where: str) -> LayerBudget:
    """Return a row from the texts of a CSV line or the values of a JSON object."""
    require_record(COLUMNS, record, where)
    params, nonzeros, dense_flops, flops = (
        number(record, column, int, where) for column in ("params", "nonzeros", "dense_flops", "flops")
    )
    threshold = None if record["threshold"] in (None, "") else number(record, "threshold", float, where)
    covered = flag(record, "covered", where) if "covered" in record else True
    row = LayerBudget(record["name"], params, nonzeros, dense_flops, flops, threshold, covered)
    for part, whole in (("nonzeros", "params"), ("flops", "dense_flops")):
        if not 0 <= getattr(row, part) <= getattr(row, whole):
            raise ValueError(
                f"{where}, column {part!r}: expected 0 to {getattr(row, whole)} ({whole}), got {getattr(row, part)}"
            )
    # A spreadsheet that wrote the file again may have rounded the share.
    if not math.isclose(number(record, "sparsity", float, where), row.sparsity, rel_tol=0, abs_tol=1e-6):
        raise ValueError(f"{where}, column 'sparsity': {record['sparsity']}, but the counts say {row.sparsity}")
    return row
