"""Checks of the files of a local data set, because the `datasets` library joins whatever files it finds."""

import filecmp
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from str_triton.training.errors import warn
from str_triton.training.hub_features import check_features, read_features

if TYPE_CHECKING:
    from datasets import DatasetBuilder

ENDINGS = {"parquet": (".parquet", ".geoparquet", ".gpq"), "arrow": (".arrow",)}  # by the name of the builder
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(\D.*)?")
NUMBER = re.compile(r"\d{4,}")
OTHER_SPLIT = re.compile(
    r"(?<![a-z])(test|testing|eval|evaluation|validation|valid|val|dev)(set|data)?(?![a-z])", re.IGNORECASE
)
TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl")
HIDDEN = re.compile(r"\.|__|cache-\w+\.arrow")
COPY = re.compile(r"(.+?)( - Copy)?( \(\d+\))?")  # of names that desktops give
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
    _check_owners(read, by_name)
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
    for paths in read.values():
        _check_endings(paths, ENDINGS[kind])
    tables = {path: read_features(folder, path) for path in chain(*files.values())}
    for name, paths in read.items():
        if any(map(has_magic, (declared.files or {}).get(name, ["*"]))):  # not if README.md names files one by one
            _check_shards(paths, declared != Declared(None, None))
            _check_numbers(paths, known)
            _check_copies(folder, paths)
    first = next(iter(tables.values()), None)
    chosen = {str(path): tables[path] for path in chain(list(tables)[:1], *read.values())}
    if builder.info.features not in (None, first):
        chosen = {CARD: builder.info.features, **chosen}
    check_features(chosen, labels)


def _check_owners(read: Mapping[str, list[Path]], by_name: bool) -> None:
    """Check that no file is read twice: a split also gets the rows of a table of metadata for images of another."""
    for path in (path for path, count in Counter(chain(*read.values())).items() if count > 1):
        owners = [repr(name) for name, paths in read.items() if path in paths]
        reason = "patterns in README.md overlap: name each file once"
        if by_name:
            reason = "its path names splits twice: rename it"
        elif len(owners) > 1:
            reason = f"README.md gives it to the splits {' and '.join(owners)}: give each split files of its own"
        raise ValueError(f"{path} would be read twice, as {reason}")


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
        place = path.parent if by_folder else path
        if by_folder and not OTHER_SPLIT.fullmatch(place.name):  # the name of a class
            place = place.parent
        words = place.as_posix()
        if OTHER_SPLIT.search(words) and "train" not in words.lower():
            raise ValueError(f"{path} would be a part of the split 'train': {rule}")
    if unread:
        more = f" and {len(unread) - 1:,} more" if len(unread) > 1 else ""
        warn(f"hub:{folder} has no split but 'train'; not read: {unread[0]}{more}; {rule}")


def _check_endings(paths: list[Path], endings: tuple[str, ...]) -> None:
    """Check that no other file is read as one more table, such as train.parquet.bak or a cache of `map`."""
    for path in paths:
        if path.suffix not in endings or (path.suffix == ".arrow" and HIDDEN.match(path.name)):
            raise ValueError(f"{path} would be read with the other files: move it away")


def _check_copies(folder: Path, paths: list[Path]) -> None:
    """Check that no file is a copy of another, by its name or its content. Files without rows may be equal."""
    import pyarrow.parquet

    sizes: dict[int, list[Path]] = {}
    for path in paths:
        name = COPY.fullmatch(path.stem)
        original = path.with_stem(name[1]) if name else path
        rivals = [original] if original != path and original in paths else []
        if path.suffix == ".arrow" or pyarrow.parquet.read_metadata(folder / path).num_rows:
            same_size = sizes.setdefault(os.path.getsize(folder / path), [])
            rivals += [other for other in same_size if filecmp.cmp(folder / other, folder / path, shallow=False)]
            same_size.append(path)
        if rivals:
            raise ValueError(f"{path} is a copy of {rivals[0]}, and both would be read: remove one of them")


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
    for path in paths:
        if shards := groups.get(group(path, path.stem)):
            return f"{path} and {next(iter(shards.values()))} are of two versions of the data set: remove one of them"
    for shards in groups.values():
        (count, _), first = next(iter(shards.items()))
        start = int((count, count) in shards)  # some count from 1
        missing = next((number for number in range(start, start + count) if (count, number) not in shards), None)
        if missing is not None:
            return f"there is {first}, but number {missing} of {count} is missing: copy all files"
    return None


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
