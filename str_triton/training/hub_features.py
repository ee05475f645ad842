"""Checks of the columns of a local data set, because the `datasets` library casts all tables to the first."""

import copy
import json
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from str_triton.training.errors import one_line

if TYPE_CHECKING:
    from datasets import DatasetBuilder, Features

FIRST_ROWS = 1_000  # of a table as text, by which its types are known
CARD = "README.md or dataset_infos.json"  # from where a builder has features
NUMERIC = re.compile("u?int|float")
POINTER = b"version https://git-lfs"  # the first bytes of a file that Git LFS has not fetched


def check_features(tables: Mapping[str, "Features"], labels: Iterable[str]) -> None:
    """Check that the columns of the tables fit those of the first, because the library casts all tables to it.

    Labels with names must have the same names everywhere, because the library keeps the numbers of the labels.
    """
    first, expected = next(iter(tables.items()), ("", {}))
    for place, features in tables.items():
        if new := [name for name in features if name not in expected]:
            raise ValueError(f"{place} has a column {new[0]!r}, which {first} lacks: all files need the same columns")
    label = next((name for name in labels if name in expected), None)
    columns = {place: features[label] for place, features in tables.items() if label in features}
    if label is not None:
        _check_kinds(columns, label)
    names = [(place, found) for place, feature in columns.items() if (found := class_names(feature))]
    for other in names[1:]:
        check_names(*names[0], *other)


def _check_kinds(columns: Mapping[str, object], label: str) -> None:
    """Check that no booleans become numbers and no numbers become booleans or text."""
    kinds = {place: _kind(feature) for place, feature in columns.items()}
    if next(iter(kinds)) == CARD and kinds[CARD] == "numbers":  # it may give names to booleans
        del kinds[CARD]
    places = {kind: place for place, kind in reversed(kinds.items())}  # the first of each kind
    for one, other in (("bool", "numbers"), ("text", "numbers"), ("text", "bool")):
        if one in places and other in places and (one == "bool" or next(iter(kinds.values())) == "text"):
            raise ValueError(
                f"column {label!r} is {one} in {places[one]}, but {other} in {places[other]}: all files need one kind"
            )


def one_column(names: Iterable[str], columns: list[str], place: str) -> str:
    """Return the first of the names that is a column. Raise ValueError if none is."""
    for name in names:
        if name in columns:
            return name
    advice = ""
    if len(columns) == 1 and (separator := re.search(r"[;\t|]", columns[0])):
        advice = f": separate them by commas, or add sep: {json.dumps(separator[0])} to the configuration in README.md"
    expected, found = " or ".join(map(repr, names)), ", ".join(columns)
    raise ValueError(f"{place} has no column {expected}; its columns are {found}{advice}")


def class_names(feature: object) -> list[str] | None:
    """Return the names of a ClassLabel as text, as README.md may have numbers, or None for another feature."""
    names = getattr(feature, "names", None)
    return names and [str(name) for name in names]


def _kind(feature: object) -> str:
    """Return "bool", "numbers", "text", or "" for other types of labels."""
    dtype = getattr(feature, "dtype", None) or ""
    if dtype == "bool":
        return dtype
    return "text" if dtype.endswith("string") else "numbers" if NUMERIC.match(dtype) else ""


def check_names(one: str, names: list[str], other: str, others: list[str]) -> None:
    """Raise ValueError unless the classes of two parts of a data set have the same names in the same order."""
    if names != others:
        ours, theirs = (textwrap.shorten(", ".join(some), 60, placeholder=" ...") for some in (names, others))
        raise ValueError(
            f"the classes of {one} are {ours}, those of {other} {theirs}: all parts need the same classes in one order"
        )


def read_features(folder: Path, path: Path) -> "Features":
    """Return the columns of a parquet or arrow file, from its schema. Raise ValueError if the file is damaged."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        if ".arrow" not in path.suffixes:
            return datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(folder / path))
        with pyarrow.memory_map(str(folder / path)) as file:
            try:
                reader = pyarrow.ipc.open_stream(file)
            except (OSError, pyarrow.ArrowInvalid):
                reader = pyarrow.ipc.open_file(file)
            else:
                for _ in reader:  # a truncated stream ends in an error
                    pass
            return datasets.Features.from_arrow_schema(reader.schema)
    except Exception as error:  # errors of the libraries for damaged files have no common base class
        raise ValueError(f"{path} {_fault_of_content(folder / path, error)}") from error


def first_features(folder: Path, path: Path, builder: "DatasetBuilder", columns: Collection[str]) -> "Features":
    """Return the types that `builder` would give those columns of a file without a schema, from its first rows.

    Columns without values have no type. Raise ValueError if the file cannot be read.
    """
    import datasets

    alone = copy.copy(builder)
    alone.config, alone.info = copy.copy(builder.config), copy.copy(builder.info)
    alone.config.data_files = datasets.data_files.DataFilesDict(
        {"train": datasets.data_files.DataFilesList([str(folder / path)], [()])}
    )
    alone.config.features = alone.info.features = None
    try:
        rows = alone.as_streaming_dataset("train").with_format("arrow")
        table = next(iter(rows.iter(FIRST_ROWS)))
    except StopIteration:  # also from the library
        return datasets.Features()
    except Exception as error:  # errors of the libraries for damaged files have no common base class
        raise ValueError(f"{path} {_fault_of_content(folder / path, error)}") from error
    filled = [name for name in table.column_names if name in columns and table[name].null_count < len(table)]
    return datasets.Features.from_arrow_schema(table.select(filled).schema)


def _fault_of_content(path: Path, error: Exception) -> str:
    start = b"?"
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(len(POINTER))
    if start == POINTER:
        return "is a pointer of Git LFS without the data: run git lfs pull"
    return f"cannot be read, copy it again: {one_line(error)}" if start else "is empty: copy it again"
