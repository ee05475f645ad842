"""Checks of the files of a local data set, because the `datasets` library joins whatever files it finds."""

import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from str_triton.training.errors import one_line, warn

if TYPE_CHECKING:
    from datasets import DatasetBuilder, Features

ENDINGS = {"parquet": (".parquet", ".geoparquet", ".gpq"), "arrow": (".arrow",)}  # by the name of the builder
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(\D.*)?")
NUMBER = re.compile(r"\d{4,}")
OTHER_SPLIT = re.compile(r"(?<![a-z])(test|testing|eval|evaluation|validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")
HIDDEN = re.compile(r"\.|__")
NUMERIC = re.compile("u?int|float|bool")
POINTER = b"version https://git-lfs"  # the first bytes of a file that Git LFS has not fetched
CARD = "README.md or dataset_infos.json"  # from where a builder has features


@dataclass(frozen=True)
class Declared:
    """Options of README.md: the patterns of the files by split, or the folder of the files, or neither."""

    files: Mapping[str, list[str]] | None
    folder: str | None


def stamps(paths: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """Return the path, size and time of change of each file, by which a cache knows its content; 0 for no file."""
    found = ((str(path), os.stat(path) if os.path.exists(path) else None) for path in paths)
    return [(path, about.st_size, about.st_mtime_ns) if about else (path, 0, 0) for path, about in found]


def check_files(
    folder: Path,
    builder: "DatasetBuilder",
    declared: Declared,
    splits: Collection[str] = (),
    labels: Iterable[str] = (),
) -> None:
    """Check the files that `builder` would read, by their names and their schemas.

    Args:
        folder: the data set's folder.
        builder: the library's builder of the configuration that is read.
        declared: the options of README.md. Without declared files the library finds them by their names.
        splits: the splits that are read; by default all.
        labels: the names that the column of labels may have; the first that exists is read.

    Raises:
        ValueError: one line.
    """
    kind, found = builder.name, builder.config.data_files or {}
    files = {  # without addresses
        name: [Path(os.path.relpath(path, folder)) for path in paths if os.path.exists(path)]
        for name, paths in found.items()
    }
    read = {name: files[name] for name in splits or files if name in files}
    by_name, by_folder = declared.files is None, kind.endswith("folder")
    repeated = [path for path, count in Counter(chain(*read.values())).items() if count > 1]
    if repeated and by_name:
        raise ValueError(f"{repeated[0]} would be read twice, as its path names splits twice: rename it")
    known = set(chain(*files.values()))
    unread = [path for path in _listed(folder, declared) if path not in known]
    if by_folder and by_name:
        _check_tables(folder, unread, labels)
    endings = {path.suffix.lower() for path in known}
    unread = [path for path in unread if path.suffix.lower() in endings]
    _check_links(folder, unread, known)
    if by_name and list(read) == ["train"] != list(splits or read):
        _check_lone_train(folder, read["train"], unread, by_folder)
    if kind not in ENDINGS:
        return
    for name, paths in read.items():
        _check_endings(paths, ENDINGS[kind])
        if any(
            map(has_magic, (declared.files or {}).get(name, ["*"]))
        ):  # files that README.md names one by one suffice
            _check_shards(paths, declared != Declared(None, None))
            _check_numbers(paths)
    tables = {path: read_features(folder, path) for path in chain(*files.values())}
    first = next(iter(tables.values()), None)
    chosen = {str(path): tables[path] for path in chain(list(tables)[:1], *read.values())}
    if builder.info.features not in (None, first):
        chosen = {CARD: builder.info.features, **chosen}
    check_features(chosen, labels)


def _listed(folder: Path, declared: Declared) -> Iterator[Path]:
    """Yield the files that belong to the data set, relative to its folder. Follow links, which the library may not."""
    if declared.files is not None:
        for pattern in chain(*declared.files.values()):
            yield from map(Path, sorted(glob(pattern, root_dir=folder, recursive=True)))
        return
    seen = set()
    for root, folders, files in os.walk(folder / (declared.folder or ""), followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # links may form a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not HIDDEN.match(name))
        place = Path(os.path.relpath(root, folder))
        yield from (place / name for name in sorted(files) if not HIDDEN.match(name))


def _check_tables(folder: Path, unread: list[Path], labels: Iterable[str]) -> None:
    """Check that no table with labels lies beside the images or sounds, as the library would not read it."""
    for path in unread:
        if path.suffix.lower() in (".parquet", ".arrow"):
            columns = " ".join(read_features(folder, path))
        elif path.suffix.lower() in TABLES:
            with open(folder / path, encoding="utf-8", errors="replace") as file:
                columns = file.read(4096)
        else:
            continue
        if any(re.search(rf"\b{name}\b", columns) for name in labels):
            raise ValueError(
                f"the names of folders would be the labels, not those in {path}: move it away, or declare the tables "
                "of all splits in README.md as data_files"
            )


def _check_links(folder: Path, unread: list[Path], known: set[Path]) -> None:
    """Check that no link leads to data that are not read: the library does not follow links to folders."""
    if gone := next((path for path in unread if not os.path.exists(folder / path)), None):
        raise ValueError(f"{gone} is a link to a file that is not there: fetch the file or remove the link")
    links = {path: next((up for up in path.parents if os.path.islink(folder / up)), None) for path in unread}
    read = {os.path.realpath(folder / path) for path in known} if any(links.values()) else set()
    for path, link in links.items():
        if link and os.path.realpath(folder / path) not in read:
            raise ValueError(f"{link} is a link to a folder, which would not be read: copy or move the folder there")


def _check_lone_train(folder: Path, paths: list[Path], unread: list[Path], by_folder: bool) -> None:
    """Check that no file of another split is among those of train; warn of files that are in no split."""
    rule = "name the files or folders of splits train, validation or test, in lower case"
    for path in paths:
        words = (path.parent if by_folder else path).as_posix()
        if OTHER_SPLIT.search(words) and "train" not in words.lower():
            raise ValueError(f"{path} would be a part of the split 'train': {rule}")
    if unread:
        more = f" and {len(unread) - 1:,} more" if len(unread) > 1 else ""
        warn(f"hub:{folder} has no split but 'train'; not read: {unread[0]}{more}; {rule}")


def _check_endings(paths: list[Path], endings: tuple[str, ...]) -> None:
    """Check that no copy of a file, such as train.parquet.bak, is read as one more file."""
    for path in paths:
        if path.suffix not in endings:
            raise ValueError(f"{path} would be read with the other files: move it away, or let it end in {endings[0]}")


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
                return f"{rival} and {path} are of two versions of the data set: remove one of them"
            others[place] = path
    for shards in groups.values():
        (count, _), first = next(iter(shards.items()))
        missing = next((number for number in range(count) if (count, number) not in shards), None)
        if missing is not None:
            return f"there is {first}, but number {missing} of {count} is missing: copy all files"
    return None


def _check_numbers(paths: list[Path]) -> None:
    """Check names like 0003.parquet, the names of the hub's own conversion: none may be missing between two others.

    That is asked of names with equally many digits, four or more, from 0 or 1, if most of the numbers are there. Other
    numbers are days, years or identifiers.
    """
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        if NUMBER.fullmatch(path.stem):
            folders.setdefault(path.parent, []).append(path)
    for own in folders.values():
        own.sort(key=lambda path: int(path.stem))
        low, high = int(own[0].stem), int(own[-1].stem)
        if low > 1 or len({len(path.stem) for path in own}) > 1 or high - low + 1 >= 2 * len(own):
            continue
        for before, after in pairwise(own):
            if int(after.stem) > int(before.stem) + 1:
                raise ValueError(f"between {before} and {after} files are missing: copy all files")


def check_features(tables: Mapping[str, "Features"], labels: Iterable[str]) -> None:
    """Check that the columns of the tables fit those of the first, because the library casts all tables to it.

    Labels with names must have the same names everywhere, because the library keeps the numbers of the labels.
    """
    first, expected = next(iter(tables.items()), ("", {}))
    for place, features in tables.items():
        if new := [name for name in features if name not in expected]:
            raise ValueError(f"{place} has a column {new[0]!r}, which {first} lacks: all files need the same columns")
    label = next((name for name in labels if name in expected), None)
    kinds = {place: features[label] for place, features in tables.items() if label in features}
    for place, kind in kinds.items():
        if _dtype(kinds[first]).endswith("string") and NUMERIC.match(_dtype(kind)):
            raise ValueError(f"column {label!r} is text in {first}, but numbers in {place}: all files need one kind")
    names = [(place, kind.names) for place, kind in kinds.items() if getattr(kind, "names", None)]
    for other in names[1:]:
        check_names(*names[0], *other)


def _dtype(feature: object) -> str:
    return getattr(feature, "dtype", None) or ""


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


def _fault_of_content(path: Path, error: Exception) -> str:
    start = b"?"
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(len(POINTER))
    if start == POINTER:
        return "is a pointer of Git LFS without the data: run git lfs pull"
    return f"cannot be read, copy it again: {one_line(error)}" if start else "is empty: copy it again"
