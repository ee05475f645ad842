"""What a model costs, layer by layer: the numbers, a table for people, and CSV and JSON files for programs."""

import math
import os
from dataclasses import dataclass
from typing import Any, Self

from str_triton.budget.table_files import (
    aligned,
    check_totals,
    number,
    read_csv,
    read_json,
    require_record,
    write_csv,
    write_json,
)

COLUMNS = ("name", "params", "nonzeros", "sparsity", "dense_flops", "flops", "threshold")
TOTALS = ("params", "nonzeros", "sparsity", "dense_flops", "flops")
HEADINGS = ("layer", "params", "nonzeros", "sparsity", "dense FLOPs", "FLOPs", "threshold")


@dataclass(frozen=True)
class LayerBudget:
    """One weight and what it costs.

    Attributes:
        name: the layer's name in `model.named_modules()`.
        params: elements of the weight.
        nonzeros: elements of the weight that are not zero.
        dense_flops: multiply-adds if no element were zero; `dense_flops / params` is how often each element is used.
        flops: multiply-adds with elements that are not zero.
        threshold: the layer's threshold, the mean where it has many, `None` where it has none.
    """

    name: str
    params: int
    nonzeros: int
    dense_flops: int
    flops: int
    threshold: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of the weight's elements that are zero, 0 to 1; 0 for a row without a weight."""
        return _sparsity(self.params, self.nonzeros)


@dataclass(frozen=True)
class Budget:
    """What a model costs: `rows`, one per weight in the model's order, and their totals.

    `str(budget)` is a table. The files hold every number exactly, so that what is read equals what was written.
    """

    rows: list[LayerBudget]

    @property
    def params(self) -> int:
        """Weights of convolution, linear and embedding layers; a shared weight counts once."""
        return sum(row.params for row in self.rows)

    @property
    def nonzeros(self) -> int:
        """Those of `params` that are not zero."""
        return sum(row.nonzeros for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of `params` that is zero, 0 to 1."""
        return _sparsity(self.params, self.nonzeros)

    @property
    def dense_flops(self) -> int:
        """Multiply-adds of the counted forward pass if no weight were zero."""
        return sum(row.dense_flops for row in self.rows)

    @property
    def flops(self) -> int:
        """Multiply-adds of the counted forward pass with weights that are not zero."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        return aligned(self.lines())

    def lines(self) -> list[tuple[str, ...]]:
        """The table's cells: a heading, a line per row, and the totals."""
        body = [_cells(row.name or "(model)", row, row.threshold) for row in self.rows]
        return [HEADINGS, *body, _cells("total", self, None)]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line per row under a heading; an absent threshold is an empty cell."""
        write_csv(path, COLUMNS, map(_record, self.rows))

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
        check_totals(path, content, budget._totals())
        return budget

    def _totals(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in TOTALS}


def _sparsity(params: int, nonzeros: int) -> float:
    return 1.0 - nonzeros / params if params else 0.0


def _cells(name: str, counts: LayerBudget | Budget, threshold: float | None) -> tuple[str, ...]:
    return (
        name,
        f"{counts.params:,}",
        f"{counts.nonzeros:,}",
        f"{100 * counts.sparsity:.2f} %" if counts.params else "",
        f"{counts.dense_flops:,}",
        f"{counts.flops:,}",
        "" if threshold is None else f"{threshold:.4g}",
    )


def _record(row: LayerBudget) -> dict[str, Any]:
    return {column: getattr(row, column) for column in COLUMNS}


def _parse(record: Any, where: str) -> LayerBudget:
    """A row from the texts of a CSV line or the values of a JSON object."""
    require_record(COLUMNS, record, where)
    counts = [number(record, column, int, where) for column in ("params", "nonzeros", "dense_flops", "flops")]
    threshold = None if record["threshold"] in (None, "") else number(record, "threshold", float, where)
    row = LayerBudget(record["name"], *counts, threshold)
    for part, whole in (("nonzeros", "params"), ("flops", "dense_flops")):
        if not 0 <= getattr(row, part) <= getattr(row, whole):
            raise ValueError(
                f"{where}, column {part!r}: expected 0 to {getattr(row, whole)} ({whole}), got {getattr(row, part)}"
            )
    # A spreadsheet that wrote the file again may have rounded the share.
    if not math.isclose(number(record, "sparsity", float, where), row.sparsity, rel_tol=0, abs_tol=1e-6):
        raise ValueError(f"{where}, column 'sparsity': {record['sparsity']}, but the counts say {row.sparsity}")
    return row
