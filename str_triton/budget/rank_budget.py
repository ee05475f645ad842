"""The cost of a compact model with matrices in factors: ranks, parameters, and work per time step."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

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
from str_triton.nn import LowRankLayer, LowRankWeight, ThresholdHolder, thresholded_weights

COLUMNS = ("name", "rows", "columns", "max_rank", "rank", "params", "dense_params", "threshold", "recurrent")
TOTALS = (
    *("total_rank", "params", "dense_params", "compression", "recurrent_flops", "dense_recurrent_flops"),
    *("other_params", "other_recurrent_flops"),
)
HEADINGS = (
    *("matrix", "rows", "columns", "max rank", "rank", "parameters", "dense parameters", "threshold"),
    *("recurrent FLOPs", "dense recurrent FLOPs"),
)
OTHER_RECURRENT, OTHERS = "(other recurrent matrices)", "(other parameters)"
RECURRENT_WEIGHTS = ("weight_hh", "weight_hr")  # How torch's names begin, in its recurrent layers and cells.


@dataclass(frozen=True)
class MatrixBudget:
    """One matrix in factors and what it costs.

    Attributes:
        name: the name of the `LowRankWeight` in `model.named_modules()`.
        rows: number of rows of the matrix.
        columns: number of columns of the matrix.
        max_rank: number of components.
        rank: number of components that the threshold leaves.
        threshold: in units of the singular values; None for a compact matrix, which has none.
        recurrent: the matrix is applied once per time step.
    """

    name: str
    rows: int
    columns: int
    max_rank: int
    rank: int
    threshold: float | None
    recurrent: bool

    @property
    def params(self) -> int:
        """Parameters of the compact matrix: the factors at this rank (at least one component), or dense if fewer."""
        return min(max(self.rank, 1) * (self.rows + self.columns), self.dense_params)

    @property
    def dense_params(self) -> int:
        """Elements of the matrix."""
        return self.rows * self.columns


@dataclass(frozen=True)
class RankBudget:
    """The cost of a compact model: `rows`, one per factored matrix in the model's order, and the rest.

    `str(budget)` is a table. The files hold every number exactly: reading returns an equal budget.

    Attributes:
        rows: the matrices in factors.
        other_params: parameters of the model outside these matrices, without thresholds.
        other_recurrent_flops: multiply-adds per time step of the recurrent matrices among `other_params`.
    """

    rows: list[MatrixBudget]
    other_params: int = 0
    other_recurrent_flops: int = 0

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of the matrices in factors."""
        return sum(row.rank for row in self.rows)

    @property
    def params(self) -> int:
        """Parameters of the whole compact model."""
        return sum(row.params for row in self.rows) + self.other_params

    @property
    def dense_params(self) -> int:
        """Parameters of the whole model if no matrix were in factors."""
        return sum(row.dense_params for row in self.rows) + self.other_params

    @property
    def compression(self) -> float:
        """Parameters of the dense model over those of the compact one; 1 for a model without parameters."""
        return self.dense_params / self.params if self.params else 1.0

    @property
    def recurrent_flops(self) -> int:
        """Multiply-adds of the recurrent matrices per time step and sequence, of the compact model."""
        return sum(row.params for row in self.rows if row.recurrent) + self.other_recurrent_flops

    @property
    def dense_recurrent_flops(self) -> int:
        """Multiply-adds of the recurrent matrices per time step and sequence, if none were in factors."""
        return sum(row.dense_params for row in self.rows if row.recurrent) + self.other_recurrent_flops

    def __str__(self) -> str:
        return aligned(self.lines())

    def lines(self) -> list[tuple[str, ...]]:
        """Return the table's cells: a heading, a line per matrix, one or two for the rest, and the totals."""
        return [HEADINGS, *map(_cells, self.rows), *self._rest_cells(), self._total_cells()]

    def _rest_cells(self) -> Iterator[tuple[str, ...]]:
        recurrent = f"{self.other_recurrent_flops:,}"
        if self.other_recurrent_flops:
            yield (OTHER_RECURRENT, "", "", "", "", recurrent, recurrent, "", recurrent, recurrent)
        others = f"{self.other_params - self.other_recurrent_flops:,}"
        yield (OTHERS, "", "", "", "", others, others, "", "", "")

    def _total_cells(self) -> tuple[str, ...]:
        params, flops = (self.params, self.dense_params), (self.recurrent_flops, self.dense_recurrent_flops)
        largest = sum(row.max_rank for row in self.rows)
        ranks = (f"{largest:,}", f"{self.total_rank:,}")
        return ("total", "", "", *ranks, *(f"{n:,}" for n in params), "", *(f"{n:,}" for n in flops))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line per matrix under a heading, and two lines for the rest; an empty cell is an absent value."""
        rest = {OTHER_RECURRENT: self.other_recurrent_flops, OTHERS: self.other_params - self.other_recurrent_flops}
        write_csv(
            path,
            COLUMNS,
            [
                *map(_record, self.rows),
                *(
                    dict.fromkeys(COLUMNS)
                    | {"name": name, "params": params, "dense_params": params, "recurrent": name == OTHER_RECURRENT}
                    for name, params in rest.items()
                ),
            ],
        )

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_csv` wrote; further columns are left aside.

        Raises `ValueError` that names the file and the column where the file is damaged or lacks a column or line.
        """
        rows, rest = [], {}
        for record, where in read_csv(path, COLUMNS):
            if record["name"] in (OTHER_RECURRENT, OTHERS):
                rest[record["name"]] = _count(record, "params", 0, where)
            else:
                rows.append(_parse(record, where))
        for name in (OTHER_RECURRENT, OTHERS):
            if name not in rest:
                raise ValueError(f"{path}: no line {name!r}; the file is cut off, write the budget again")
        return cls(rows, sum(rest.values()), rest[OTHER_RECURRENT])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the totals by name, and `rows` as a list of objects."""
        write_json(path, self._totals(), map(_record, self.rows))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_json` wrote; further keys are left aside.

        Raises `ValueError` that names the file and the column where the file is damaged or lacks a column.
        """
        content, records = read_json(path, TOTALS)
        others, recurrent = (_count(content, key, 0, str(path)) for key in ("other_params", "other_recurrent_flops"))
        if recurrent > others:
            raise ValueError(f"{path}, column 'other_recurrent_flops': {recurrent}, but other_params is {others}")
        budget = cls([_parse(record, where) for record, where in records], others, recurrent)
        check_totals(path, content, budget._totals())
        return budget

    def _totals(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in TOTALS}


def count_ranks(model: nn.Module) -> RankBudget:
    """Return what `model` costs once every `LowRankWeight` in it is compact, and what it would cost dense.

    Parameters are those of the whole model: the compact matrices (dense ones where the factors are no smaller), and
    every other parameter once, biases, embeddings and classifiers included; thresholds and the m of factored matrices
    are left out, since they are folded away. A matrix that several modules share counts once.

    Recurrent matrices are the `LowRankWeight`s that say so, and the dense ones of `nn.RNN`, `nn.GRU`, `nn.LSTM`, their
    cells, and of any `LowRankLayer`, if they have torch's names (`weight_hh...`, `weight_hr...`). Any other matrix
    counts as an ordinary parameter.
    """
    rows = [
        MatrixBudget(
            name,
            matrix.rows,
            matrix.columns,
            matrix.max_rank,
            matrix.rank,
            None if matrix.raw_threshold is None else float(matrix.threshold.detach()),
            matrix.recurrent,
        )
        for name, matrix in factored_matrices(model).items()
    ]
    return RankBudget(rows, *other_costs(model))


def factored_matrices(model: nn.Module) -> dict[str, LowRankWeight]:
    """Return the `LowRankWeight`s of a model by name, in its order; one that is shared under its first name."""
    first: dict[tuple[int, ...], tuple[str, LowRankWeight]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankWeight):
            key = tuple(map(id, (module.u, module.v, module.m, module.raw_threshold)))
            first.setdefault(key, (name, module))
    return dict(first.values())


def other_costs(model: nn.Module) -> tuple[int, int]:
    """Count the parameters outside the matrices in factors, without thresholds; and the recurrent ones among them."""
    inside: set[int] = set()
    recurrent: set[int] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, LowRankWeight):
            inside.update(map(id, own.values()))
        elif isinstance(module, ThresholdHolder):
            inside.add(id(module.raw_threshold))
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase | LowRankLayer):
            recurrent.update(id(weight) for name, weight in own.items() if name.startswith(RECURRENT_WEIGHTS))
    for weight in thresholded_weights(model):
        if isinstance(weight.module, nn.RNNBase | nn.RNNCellBase) and weight.attribute.startswith(RECURRENT_WEIGHTS):
            recurrent.add(id(weight.dense))
    others = {id(parameter): parameter.numel() for parameter in model.parameters() if id(parameter) not in inside}
    return sum(others.values()), sum(numel for key, numel in others.items() if key in recurrent)


def _cells(row: MatrixBudget) -> tuple[str, ...]:
    numbers = (row.rows, row.columns, row.max_rank, row.rank, row.params, row.dense_params)
    flops = (f"{row.params:,}", f"{row.dense_params:,}") if row.recurrent else ("", "")
    threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
    return (row.name or "(model)", *(f"{n:,}" for n in numbers), threshold, *flops)


def _record(row: MatrixBudget) -> dict[str, Any]:
    return {column: getattr(row, column) for column in COLUMNS}


def _parse(record: Any, where: str) -> MatrixBudget:
    """Return a row from the texts of a CSV line or the values of a JSON object."""
    require_record(COLUMNS, record, where)
    rows, columns, max_rank = (_count(record, column, 1, where) for column in ("rows", "columns", "max_rank"))
    rank = _count(record, "rank", 0, where)
    if rank > max_rank:
        raise ValueError(f"{where}, column 'rank': expected 0 to {max_rank} (max_rank), got {rank}")
    threshold = None if record["threshold"] in (None, "") else number(record, "threshold", float, where)
    row = MatrixBudget(record["name"], rows, columns, max_rank, rank, threshold, flag(record, "recurrent", where))
    for column in ("params", "dense_params"):
        if number(record, column, int, where) != getattr(row, column):
            raise ValueError(f"{where}, column {column!r}: {record[column]}, but the rank says {getattr(row, column)}")
    return row


def _count(record: Any, column: str, least: int, where: str) -> int:
    count = number(record, column, int, where)
    if count < least:
        raise ValueError(f"{where}, column {column!r}: expected {least} or more, got {count}")
    return count
