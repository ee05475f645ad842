"""Tables of costs as text for people, and as CSV and JSON files for programs: used by both kinds of budgets."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from str_triton.files import printable, write_atomically


def aligned(lines: Sequence[Sequence[str]], totals: int = 1) -> str:
    """Return a table of cells: a heading, lines, and at the end the totals; the first column is left-aligned.

    Names may come from a file, so control characters are escaped.
    """
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    rule = "-" * len(text[0])
    return "\n".join([text[0], rule, *text[1:-totals], rule, *text[-totals:]])


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Write a line per record under a heading; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([record[column] for column in columns] for record in records)
    write_atomically(path, text.getvalue())


def read_csv(path: str | os.PathLike[str], columns: Sequence[str]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Return what `write_csv` wrote: the texts of each line by column, and the line's place in the file, for messages.

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
    require(columns, reader.fieldnames or (), str(path))
    for number, record in enumerate(records, 1):
        if None in record:
            raise ValueError(f"{path}, row {number}: more cells than columns, from {record[None][0]!r} on")
    return ((record, f"{path}, row {number}") for number, record in enumerate(records, 1))


def write_json(path: str | os.PathLike[str], totals: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
    """Write the totals by name, and the records as the list `rows`."""
    write_atomically(path, json.dumps({**totals, "rows": list(records)}, indent=2) + "\n")


def read_json(path: str | os.PathLike[str], totals: Sequence[str]) -> tuple[dict[str, Any], list[tuple[Any, str]]]:
    """Return what `write_json` wrote: the whole object, and each of its rows with its place, for messages.

    Raises `ValueError` that names the file and the column where the file is damaged or lacks a column.
    """
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a budget in JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a budget in JSON is an object, got {type(content).__name__}")
    require((*totals, "rows"), content, str(path))
    if not isinstance(content["rows"], list):
        raise ValueError(f"{path}, column 'rows': expected a list, got {content['rows']!r}")
    return content, [(record, f"{path}, row {number}") for number, record in enumerate(content["rows"], 1)]


def check_totals(path: str | os.PathLike[str], content: Mapping[str, Any], totals: Mapping[str, Any]) -> None:
    """Raise ValueError unless the file's totals are those of its rows."""
    for key, total in totals.items():
        if content[key] != total:
            raise ValueError(f"{path}, column {key!r}: {content[key]!r}, but the rows say {total!r}")


def flag(record: Mapping[str, Any], column: str, where: str) -> bool:
    """Return the truth value in a cell, from its text or its JSON value."""
    text = str(record[column]).lower()  # Spreadsheets write TRUE.
    if text not in ("true", "false"):
        raise ValueError(f"{where}, column {column!r}: expected true or false, got {record[column]!r}")
    return text == "true"


def require(columns: Sequence[str], found: Any, where: str) -> None:
    """Raise ValueError that names the first missing column, if one is missing."""
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(f"{where}: no column {missing[0]!r}; a budget has {', '.join(columns)}")


def require_record(columns: Sequence[str], record: Any, where: str) -> None:
    """Raise ValueError unless the record is an object with these columns and a text as its name."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected the columns {', '.join(columns)}, got {record!r}")
    require(columns, record, where)
    if not isinstance(record["name"], str):
        raise ValueError(f"{where}, column 'name': expected a text, got {record['name']!r}")


def number(record: Mapping[str, Any], column: str, kind: type[int] | type[float], where: str) -> Any:
    """Return the number in a cell, from its text or its JSON value."""
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
