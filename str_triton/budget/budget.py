"""What a model costs, layer by layer: the numbers, a table for people, and CSV and JSON files for programs."""

import csv
import io
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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
        body = [_cells(row.name or "(model)", row, row.threshold) for row in self.rows]
        lines = [HEADINGS, *body, _cells("total", self, None)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
        text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        rule = "-" * len(text[0])
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line per row under a heading; an absent threshold is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_record(row).values() for row in self.rows)
        _write(path, text.getvalue())

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_csv` wrote; further columns are left aside.

        Raises `ValueError` that names the file and the column where the file is damaged or lacks a column.
        """
        text = _read(path)
        if not text.endswith("\n"):
            raise ValueError(f"{path}: the last line is cut off; write the budget again")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        try:
            records = list(reader)
        except csv.Error as error:
            raise ValueError(f"{path}: not a budget in CSV: {error}") from None
        _require(COLUMNS, reader.fieldnames or (), str(path))
        for number, record in enumerate(records, 1):
            if None in record:
                raise ValueError(f"{path}, row {number}: more cells than columns, from {record[None][0]!r} on")
        return cls([_parse(record, f"{path}, row {number}") for number, record in enumerate(records, 1)])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the totals by name, and `rows` as a list of objects."""
        content = {key: getattr(self, key) for key in TOTALS} | {"rows": [_record(row) for row in self.rows]}
        _write(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_json` wrote; further keys are left aside.

        Raises `ValueError` that names the file and the column where the file is damaged or lacks a column.
        """
        try:
            content = json.loads(_read(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not a budget in JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: a budget in JSON is an object, got {type(content).__name__}")
        _require((*TOTALS, "rows"), content, str(path))
        if not isinstance(content["rows"], list):
            raise ValueError(f"{path}, column 'rows': expected a list, got {content['rows']!r}")
        budget = cls([_parse(record, f"{path}, row {number}") for number, record in enumerate(content["rows"], 1)])
        for key in TOTALS:
            if content[key] != getattr(budget, key):
                raise ValueError(f"{path}, column {key!r}: {content[key]!r}, but the rows say {getattr(budget, key)!r}")
        return budget


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


def _require(columns: tuple[str, ...], found: Any, where: str) -> None:
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(f"{where}: no column {missing[0]!r}; a budget has {', '.join(columns)}")


def _parse(record: Any, where: str) -> LayerBudget:
    """A row from the texts of a CSV line or the values of a JSON object."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected the columns {', '.join(COLUMNS)}, got {record!r}")
    _require(COLUMNS, record, where)
    if not isinstance(record["name"], str):
        raise ValueError(f"{where}, column 'name': expected a text, got {record['name']!r}")
    counts = [_number(record, column, int, where) for column in ("params", "nonzeros", "dense_flops", "flops")]
    threshold = None if record["threshold"] in (None, "") else _number(record, "threshold", float, where)
    row = LayerBudget(record["name"], *counts, threshold)
    for part, whole in (("nonzeros", "params"), ("flops", "dense_flops")):
        if not 0 <= getattr(row, part) <= getattr(row, whole):
            raise ValueError(
                f"{where}, column {part!r}: expected 0 to {getattr(row, whole)} ({whole}), got {getattr(row, part)}"
            )
    # A spreadsheet that wrote the file again may have rounded the share.
    if not math.isclose(_number(record, "sparsity", float, where), row.sparsity, rel_tol=0, abs_tol=1e-6):
        raise ValueError(f"{where}, column 'sparsity': {record['sparsity']}, but the counts say {row.sparsity}")
    return row


def _number(record: Mapping[str, Any], column: str, kind: type[int] | type[float], where: str) -> Any:
    try:
        return kind(str(record[column]))  # Through the text: int() alone would take True and 2.5 as well.
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{where}, column {column!r}: expected {wanted}, got {record[column]!r}") from None


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Spreadsheets put a byte order mark in front.
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None


def _write(path: str | os.PathLike[str], text: str) -> None:
    """Write beside and rename, so that `path` is never half a budget."""
    draft = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
