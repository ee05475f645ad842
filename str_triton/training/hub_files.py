"""Checks of the files of a local data set, because the `datasets` library joins whatever files it finds."""

import json
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(\D.*)?\.(parquet|arrow)")
NUMBER = re.compile(r"\d+\.(parquet|arrow)")


def check_files(folder: Path, splits: Mapping[str, Iterable[str]]) -> None:
    """Check the files of each split below `folder`, by their names and their schemas; nothing else is read.

    Raises ValueError, in one line, if files are missing among numbered ones, if two are of two versions, or if two give
    their classes other numbers.
    """
    here = []
    for paths in splits.values():
        own = sorted(Path(os.path.relpath(path, folder)) for path in paths if os.path.exists(path))  # not an address
        _check_shards(folder, own)
        _check_numbers(own)
        here += own
    _check_classes(folder, here)


def _check_shards(folder: Path, paths: list[Path]) -> None:
    """Check names like train-00000-of-00002.parquet. Parts in other folders belong together only if README says so."""
    readme = folder / "README.md"
    declared = readme.is_file() and re.search(r"^[\s-]*data_files:", readme.read_text(encoding="utf-8"), re.MULTILINE)
    parts: dict[Path, dict[tuple[int, int], Path]] = {}
    for path in paths:
        if shard := SHARD.fullmatch(path.name):
            place = int(shard["count"]), int(shard["number"])
            others = parts.setdefault(path.parent / shard["split"] if declared else Path(shard["split"]), {})
            rival = others.get(place) or next((others[other] for other in others if other[0] != place[0]), None)
            if rival is not None:
                raise ValueError(f"{rival} and {path} are of two versions of the data set: remove one of them")
            others[place] = path
    for shards in parts.values():
        (count, _), first = next(iter(shards.items()))
        missing = next((number for number in range(count) if (count, number) not in shards), None)
        if missing is not None:
            raise ValueError(f"there is {first}, but number {missing} of {count} is missing: copy all files")


def _check_numbers(paths: list[Path]) -> None:
    """Check names like 0003.parquet, if they begin with 0 or 1: years, for example, need not be complete."""
    numbered: dict[Path, list[Path]] = {}
    for path in paths:
        if NUMBER.fullmatch(path.name):
            numbered.setdefault(path.parent, []).append(path)
    for own in numbered.values():
        own.sort(key=lambda path: int(path.stem))
        for before, after in pairwise(own):
            if int(own[0].stem) <= 1 and int(after.stem) > int(before.stem) + 1:
                raise ValueError(f"between {before} and {after} files are missing: copy all files")


def _check_classes(folder: Path, paths: list[Path]) -> None:
    """Check that labels with names have the same names in all files: the library takes those of the first file."""
    known: dict[str, tuple[Path, list[str]]] = {}
    for path in paths:
        for column, names in _class_names(folder / path).items():
            first, expected = known.setdefault(column, (path, names))
            check_names(str(first), expected, str(path), names)


def check_names(one: str, names: list[str], other: str, others: list[str]) -> None:
    """Raise ValueError unless the classes of two parts of a data set have the same names in the same order."""
    if names != others:
        ours, theirs = (textwrap.shorten(", ".join(some), 60, placeholder=" ...") for some in (names, others))
        raise ValueError(
            f"the classes of {one} are {ours}, those of {other} {theirs}: encode the labels of all parts together"
        )


def _class_names(path: Path) -> dict[str, list[str]]:
    """Return the names of classes by column, as the file's schema has them from the `datasets` library."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        schema = pyarrow.parquet.read_schema(path)
    elif path.suffix == ".arrow":
        with pyarrow.memory_map(str(path)) as file:
            schema = pyarrow.ipc.open_stream(file).schema
    else:
        return {}
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {name: feature["names"] for name, feature in features.items() if _is_class_label(feature)}


def _is_class_label(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
