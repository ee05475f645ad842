"""Checks of the tables of a split of a local data set: the `datasets` library joins whatever files it finds."""

import filecmp
import os
import re
from collections.abc import Callable, Collection, Iterable
from itertools import chain, pairwise
from pathlib import Path

ENDINGS = {  # by the name of the builder
    "parquet": (".parquet", ".geoparquet", ".gpq"),
    "arrow": (".arrow",),
    "csv": (".csv", ".tsv"),
    "json": (".json", ".jsonl", ".ndjson"),
    "text": (".txt",),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
SUFFIXES = (*chain(*ENDINGS.values()), *COMPRESSED)
HIDDEN = re.compile(r"\.|__|cache-\w+\.arrow")
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(\D.*)?")
NUMBER = re.compile(r"\d{4,}")
COPY = re.compile(r"(.+?)( - Copy)?( \(\d+\))?")  # of names that desktops give


def check_endings(kind: str, paths: Iterable[Path]) -> None:
    """Check that no other file is read as one more table, such as train.parquet.bak or a cache of `map`."""
    for path in paths:
        suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
        if suffix not in ENDINGS[kind] or (suffix == ".arrow" and HIDDEN.match(path.name)):
            raise ValueError(f"{path} would be read with the other files: move it away")


def check_split(folder: Path, kind: str, paths: list[Path], known: Collection[Path], declared: bool) -> None:
    """Check that the files of a split are complete and of one version, and that none is a copy of another.

    Args:
        folder: the data set's folder.
        kind: the name of the builder, a key of ENDINGS.
        paths: the files of the split, relative to `folder`.
        known: the files of all splits.
        declared: whether README.md declares the files or their folder.

    Raises:
        ValueError: one line.
    """
    _check_shards(paths, declared)
    if kind != "text":  # the numbers of documents may have gaps
        _check_numbers(paths, known)
    _check_copies(folder, kind, paths)


def _check_copies(folder: Path, kind: str, paths: list[Path]) -> None:
    """Check that no file is a copy of another, by its name or its content. Files without rows may be equal."""
    stems = {_stem(path, kind): path for path in paths}
    sizes: dict[int, list[Path]] = {}
    for path in paths:
        stem = _stem(path, kind)
        name = COPY.fullmatch(stem.name)
        original = stems.get(stem.with_name(name[1]) if name else stem, path)
        rivals = [original] if original != path else []
        if has_rows(folder / path, kind):
            same_size = sizes.setdefault(os.path.getsize(folder / path), [])
            rivals += [other for other in same_size if filecmp.cmp(folder / other, folder / path, shallow=False)]
            same_size.append(path)
        if rivals:
            raise ValueError(f"{path} is a copy of {rivals[0]}, and both would be read: remove one of them")


def _stem(path: Path, kind: str) -> Path:
    """Return the path without its ending, such as .csv or .csv.gz."""
    path = path.with_suffix("") if path.suffix in COMPRESSED else path
    return path.with_suffix("") if path.suffix in ENDINGS[kind] else path


def has_rows(path: Path, kind: str) -> bool:
    """Return whether the table has rows to compare with those of others: documents may be equal."""
    if kind == "parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows > 0
    if kind == "text":
        return False
    with open(path, "rb") as file:
        if kind == "csv":  # the first line names the columns
            file.readline()
        return kind == "arrow" or bool(file.read(4096).strip())


def _check_shards(paths: list[Path], declared: bool) -> None:
    """Check names like train-00000-of-00002.parquet: all parts must be there.

    Parts in other folders belong together. If README.md declares the files, each folder may also have its own parts.
    """
    faults = [_fault_of_shards(paths, lambda path, split: split)]
    if declared:
        faults.insert(0, _fault_of_shards(paths, lambda path, split: f"{path.parent}/{split}"))
    if all(faults):
        raise ValueError(faults[0])


def _fault_of_shards(paths: list[Path], group: Callable[[Path, str], str]) -> str | None:
    groups: dict[str, dict[tuple[int, int], Path]] = {}
    for path in paths:
        if shard := SHARD.fullmatch(path.name):
            place = int(shard["count"]), int(shard["number"])
            others = groups.setdefault(group(path, shard["split"]), {})
            rival = others.get(place) or next((others[other] for other in others if other[0] != place[0]), None)
            if rival is not None:
                return _two_versions(rival, path)
            others[place] = path
    for path in paths:
        if shards := groups.get(group(path, path.stem)):
            return _two_versions(path, next(iter(shards.values())))
    for shards in groups.values():
        (count, _), first = next(iter(shards.items()))
        start = int((count, count) in shards)  # some count from 1
        missing = next((number for number in range(start, start + count) if (count, number) not in shards), None)
        if missing is not None:
            return f"there is {first}, but number {missing} of {count} is missing: copy all files"
    return None


def _two_versions(one: Path, other: Path) -> str:
    advice = "" if one.parent == other.parent else ", or name one of the folders"
    return f"{one} and {other} are of two versions of the data set: remove one of them{advice}"


def _check_numbers(paths: list[Path], known: Collection[Path]) -> None:
    """Check names like 0003.parquet, the names of the hub's own conversion: none may be missing between two others.

    That is asked of names with equally many digits, four or more, from 0 or 1, if most of the numbers are there. Other
    numbers are days, years or identifiers. Folders side by side may share one count.
    """
    folders: dict[Path, list[Path]] = {}
    for path in known:
        if NUMBER.fullmatch(path.stem):
            folders.setdefault(path.parent, []).append(path)
    for place in sorted({path.parent for path in paths} & set(folders)):
        own = {int(path.stem): path for path in folders[place]}
        beside = chain(*(folders[other] for other in folders if other != place and other.parent == place.parent))
        elsewhere = {int(path.stem) for path in beside}
        low, high = min(own), max(own)
        if low > 1 or len({len(path.stem) for path in own.values()}) > 1 or high - low + 1 >= 2 * len(own):
            continue
        for before, after in pairwise(sorted(own)):
            gap = set(range(before + 1, after))
            if gap and (own.keys() & elsewhere or not gap <= elsewhere):
                raise ValueError(f"between {own[before]} and {own[after]} files are missing: copy all files")
