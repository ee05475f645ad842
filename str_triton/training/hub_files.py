"""Checks of the files of a local data set, because the `datasets` library joins whatever files it finds."""

import os
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING

from str_triton.training.errors import warn
from str_triton.training.hub_features import CARD, check_features, first_features, read_features
from str_triton.training.hub_labels import TABLES, check_classes, check_tables
from str_triton.training.hub_splits import check_copies_of_train
from str_triton.training.hub_tables import ENDINGS, HIDDEN, SUFFIXES, check_endings, check_split, has_rows

if TYPE_CHECKING:
    from datasets import DatasetBuilder, Features

OTHER_SPLIT = re.compile(
    r"(?<![a-z])(test|testing|eval|evaluation|validation|valid|val|dev)(set|data)?(?![a-z])", re.IGNORECASE
)
KEYWORD = re.compile(  # of splits, to the library
    r"(?<![^-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?![^-._ 0-9])"
)
MEANINGS = {"tr": "train", "va": "validation", "de": "validation", "te": "test", "ev": "test"}  # of KEYWORD, to it
NUMBER = re.compile(r"\d+|of|(?=.*\d)[0-9a-f]{8,}")  # of a shard, or the hash of its content


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
        check_tables(folder, unread, known, tuple(labels))
    endings = {path.suffix.lower() for path in known}
    unread = [path for path in unread if path.suffix.lower() in endings]
    _check_links(folder, unread, known)
    if by_name and list(read) == ["train"] != list(splits or read):
        _check_lone_train(folder, read["train"], unread, by_folder)
    if declared == Declared(None, None):
        _check_places(folder, read, by_folder)
    patterns = declared.files or {}
    globbed = {name: paths for name, paths in read.items() if any(map(has_magic, patterns.get(name, ["*"])))}
    for split, paths in globbed.items():
        if len(patterns.get(split, ["*"])) == 1:
            _check_names(folder, split, [path.parent for path in paths] if by_folder else paths)
    if kind == "imagefolder" and files.get("train"):
        check_classes(files, builder.config.drop_labels)
    if kind not in ENDINGS:
        single = {name: [path for path in paths if path.suffix not in TABLES] for name, paths in read.items()}
        check_copies_of_train(folder, single, tables=False)
        return
    check_endings(kind, chain(*globbed.values()))
    tables = _schemas(folder, builder, list(chain(*files.values())), list(chain(*read.values())), tuple(labels))
    for paths in globbed.values():
        check_split(folder, kind, paths, known, declared != Declared(None, None))
    check_features(tables, labels)
    filled = {name: [path for path in paths if has_rows(folder / path, kind)] for name, paths in read.items()}
    check_copies_of_train(folder, filled, tables=True)


def _schemas(
    folder: Path, builder: "DatasetBuilder", known: list[Path], read: list[Path], labels: tuple[str, ...]
) -> "dict[str, Features]":
    """Return the columns to compare: of README.md, of the first file, to which the library casts all, and of `read`.

    Tables as text have the types of their first rows, and of their labels alone: the library compares the names of all
    columns. It casts labels for which README.md has a type of text.
    """
    card, some = builder.info.features, dict.fromkeys((*known[:1], *read))
    if builder.name in ("parquet", "arrow"):
        tables = {path: read_features(folder, path) for path in known}
        chosen = {str(path): tables[path] for path in some}
        return chosen if card in (None, *list(tables.values())[:1]) else {CARD: card, **chosen}
    label = next((name for name in labels if card and name in card), None)
    if builder.name == "text" or not labels or (label and getattr(card[label], "dtype", None) == "string"):
        return {}
    chosen = {str(path): first_features(folder, path, builder, labels) for path in some}
    return {place: features for place, features in chosen.items() if features}


def _check_owners(read: Mapping[str, list[Path]], by_name: bool) -> None:
    """Check that no file is read twice: a split also gets the rows of a table of metadata for images of another.

    Two splits other than train may share files, which README.md gives to both.
    """
    for path in (path for path, count in Counter(chain(*read.values())).items() if count > 1):
        owners = [repr(name) for name, paths in read.items() if path in paths]
        if not by_name and len(owners) > 1 and "'train'" not in owners:
            continue
        reason = "patterns in README.md overlap: name each file once"
        if by_name:
            reason = (
                "its path names splits twice: rename it, or declare the files in README.md, as train/** and test/**"
            )
        elif len(owners) > 1:
            reason = f"README.md gives it to the splits {' and '.join(owners)}: give each split files of its own"
        raise ValueError(f"{path} would be read twice, as {reason}")


def _listed(folder: Path, declared: Declared) -> Iterator[Path]:
    """Yield the files that belong to the data set, relative to its folder. Follow links, which the library may not."""
    if declared.files is not None:
        for pattern in chain(*declared.files.values()):
            yield from map(Path, sorted(glob(pattern, root_dir=folder, recursive=True)))
        return
    for path in files_below(folder / (declared.folder or "")):
        yield Path(os.path.relpath(folder / (declared.folder or "") / path, folder))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the paths below a folder of its files, without hidden ones. Follow links."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # links may form a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not HIDDEN.match(name))
        place = Path(os.path.relpath(root, folder))
        yield from (place / name for name in sorted(files) if not HIDDEN.match(name))


def _check_places(folder: Path, read: Mapping[str, list[Path]], by_folder: bool) -> None:
    """Check that no two folders look like data sets, each with several splits. Warn of others that are joined."""
    places: dict[Path, set[str]] = {}
    for split, paths in read.items():
        for path in paths:
            depth = next((depth for depth, part in enumerate(path.parts) if KEYWORD.search(part)), None)
            if depth is not None or not by_folder:  # without a split in the path, folders may be classes
                places.setdefault(Path(*path.parts[:depth]) if depth is not None else path.parent, set()).add(split)
    for one, other in combinations(sorted(place for place, names in places.items() if len(names) > 1), 2):
        if len(both := sorted(places[one] & places[other])) > 1:
            raise ValueError(
                f"{_named(one)} and {_named(other)} both have {' and '.join(both)}, like two data sets: name one, "
                f"hub:{folder / other}, or declare the files to join in README.md as data_files"
            )
    for split in read:
        joined = sorted(place for place in places if split in places[place])
        if len(joined) > 1:
            some = textwrap.shorten(", ".join(map(_named, joined)), 100, placeholder=" ...")
            warn(f"hub:{folder}: {split!r} joins the files of {some}; to read one, name it: hub:{folder / joined[-1]}")


def _check_names(folder: Path, split: str, paths: Iterable[Path]) -> None:
    """Check that names with the word of the split differ by numbers alone, unlike train and train_test. Warn if not."""
    names: dict[Path, dict[str, str]] = {}  # by folder, one of each kind
    for path in paths:
        depth, part = next(((at, part) for at, part in enumerate(path.parts) if KEYWORD.search(part)), (0, ""))
        if part:
            words = re.split(r"[\W_]+", re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))})+$", "", part))
            plain = " ".join(re.sub(r"(?<=[^v\d])\d+$", "", word) for word in words if not NUMBER.fullmatch(word))
            names.setdefault(Path(*path.parts[:depth]), {}).setdefault(plain, part)
    for kinds in names.values():
        for part in kinds.values() if len(kinds) > 1 else ():
            if len({MEANINGS[word[:2]] for word in KEYWORD.findall(part)}) > 1:
                raise ValueError(f"{part} would be a part of the split {split!r}, but names two splits: rename it")
        if len(kinds) > 1:
            some = textwrap.shorten(", ".join(sorted(kinds.values())), 100, placeholder=" ...")
            warn(f"hub:{folder}: {split!r} joins {some}: if one has other examples or the same again, move it away")


def _named(place: Path) -> str:
    return "the folder itself" if place == Path() else str(place)


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
    rule = "name splits train, validation or test, in lower case, apart from other words by - _ . or a space"
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
