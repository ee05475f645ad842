"""Checks of class folders: of their names, and of tables beside them, which the `datasets` library does not read."""

import csv
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from str_triton.training.hub_features import FIRST_ROWS, read_features

TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")


def check_classes(files: Mapping[str, list[Path]], drop_labels: bool | None) -> None:
    """Check that train has the classes of all splits: the library joins the folders of all splits.

    Args:
        files: the files of each split.
        drop_labels: the option of README.md. Without it the library reads no classes from folders of unequal depths.
    """
    images = {name: [path for path in paths if path.suffix not in (".zip", *TABLES)] for name, paths in files.items()}
    if images != files:
        return  # the names of the folders are in archives, or are no labels
    high, low = (choose(chain(*images.values()), key=lambda path: len(path.parts)) for choose in (min, max))
    if len(high.parts) < len(low.parts):
        if drop_labels is None:
            raise ValueError(
                f"{high} lies higher than {low}, so the names of folders are not read as classes: put all images in "
                "folders of classes, which lie side by side in a split"
            )
        return
    classes = {name: {path.parent.name for path in paths} for name, paths in images.items()}
    for other, names in classes.items():
        if lacking := sorted(names - classes["train"]):
            raise ValueError(
                f"train lacks the class {lacking[0]!r}, which {other} has: train needs folders of all classes"
            )


def check_tables(folder: Path, unread: Iterable[Path], known: Collection[Path], labels: Collection[str]) -> None:
    """Check that no table beside images or sounds gives them labels: the library would not read it.

    Args:
        folder: the data set's folder.
        unread: the files that are not read, relative to `folder`.
        known: the files that are read.
        labels: the names that the column of labels may have.
    """
    for path in unread:
        if path.suffix.lower() in TABLES and _has_labels_of(known, folder, path, labels):
            raise ValueError(
                f"the names of folders would be the labels, not those in {path}: move it away, or declare the tables "
                "of all splits in README.md as data_files"
            )


def _has_labels_of(known: Collection[Path], folder: Path, path: Path, labels: Collection[str]) -> bool:
    """Return whether the table has a column of different labels and, in another column, names of the files `known`.

    Names without endings count if there are more than folders, as they may be the numbers of classes.
    """
    if path.suffix.lower() in (".parquet", ".arrow"):
        return any(name in labels for name in read_features(folder, path))
    with open(folder / path, encoding="utf-8", errors="replace") as file:
        if not re.search(rf"\b({'|'.join(labels)})\b", file.read(4096)):
            return False
    names, stems = {other.name for other in known}, {other.stem for other in known}
    folders, found, values, named = len({other.parent for other in known}), set(), set(), False
    rows = _rows(folder / path, labels)
    labelled = ((label, row) for row in rows if (label := next((name for name in labels if name in row), None)))
    for number, (label, row) in enumerate(labelled):
        others = {os.path.basename(str(value)) for name, value in row.items() if name != label}
        found |= others & stems
        named = named or len(found) > folders or not names.isdisjoint(others)
        values.add(str(row[label]))
        if named and len(values) > 1:
            return True
        if number > FIRST_ROWS and not named:
            break
    return False


def _rows(path: Path, labels: Collection[str]) -> Iterator[Mapping[Any, Any]]:
    if path.suffix.lower() in (".csv", ".tsv"):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            header = file.readline()
            separator = max(",;\t|", key=header.count)
            columns = next(csv.reader([header], delimiter=separator), [])
            yield from (dict(zip(columns, row, strict=False)) for row in csv.reader(file, delimiter=separator))
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
    except ValueError:
        try:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:  # no table
            return
    yield from _records(content, labels)


def _records(content: object, labels: Collection[str]) -> Iterator[Mapping[Any, Any]]:
    """Yield the rows in JSON: a list of rows, or an object that holds such lists, columns, or rows by their names."""
    if isinstance(content, list):
        yield from (row for row in content if isinstance(row, dict))
    elif isinstance(content, dict):
        parts = {name: part for name, part in content.items() if isinstance(part, dict | list)}
        columns = [part.values() if isinstance(part, dict) else part for part in parts.values()]
        yield from (dict(zip(parts, row, strict=True)) for row in zip(*columns, strict=False))
        for name, part in parts.items():
            if isinstance(part, list):
                yield from _records(part, labels)
                pairs: list[Any] = [row for row in part if isinstance(row, list) and len(row) > 1]
            else:
                yield {"": name, **part}
                pairs = [*part.items()]
            if name in labels:  # names of files with their labels
                yield from ({"": pair[0], name: pair[1]} for pair in pairs)
