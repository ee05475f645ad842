"""Reading of local folders that `save_to_disk` of the `datasets` library wrote."""

import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from str_triton.training.errors import warn
from str_triton.training.hub_features import check_features, read_features
from str_triton.training.hub_files import OTHER_SPLIT, files_below
from str_triton.training.hub_labels import TABLES

if TYPE_CHECKING:
    from datasets import Dataset, Features

FILES = ("dataset_info.json", "state.json")  # of a split, beside its tables
CARDS = ("README.md", ".huggingface.yaml")  # which may declare the files of several
LISTING = "dataset_dict.json"  # the names of the splits of a DatasetDict


def saved_splits(folder: Path) -> dict[str, Path]:
    """Return the folder of each split, or none if `save_to_disk` did not write `folder`.

    A warning names tables and saved data sets that are in no split. Raise ValueError, in one line, if a split is gone
    or if `folder` holds several saved data sets.
    """
    splits = {part.name: part for part in sorted(folder.iterdir()) if _is_saved(part)}
    if (folder / LISTING).is_file():
        names = json.loads((folder / LISTING).read_text(encoding="utf-8"))["splits"]
        if gone := [name for name in names if name not in splits]:
            raise ValueError(f"{LISTING} names the split {gone[0]!r}, but its folder is not there: copy it again")
        splits = {name: splits[name] for name in names}
    elif _is_saved(folder):
        splits = {"train": folder}
    if splits:
        _warn_of_others(folder, splits)
        return splits
    inner = {path.parent.parent for path in folder.glob("*/*/state.json") if _is_saved(path.parent)}
    if len(inner) > 1 and not any((folder / card).is_file() for card in CARDS):
        names = textwrap.shorten(", ".join(sorted(path.name for path in inner)), 100, placeholder=" ...")
        raise ValueError(f"{names} are data sets of their own: name one, such as hub:{min(inner)}")
    return {}


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder as one split."""
    return all((folder / name).is_file() for name in FILES)


def _warn_of_others(folder: Path, splits: Mapping[str, Path]) -> None:
    others: dict[str, None] = {}
    for path in files_below(folder):
        place, kind = folder / path.parent, path.suffix.lower()
        own = place in splits.values() and (kind == ".arrow" or path.name in FILES)
        if kind in TABLES and not own and (kind != ".json" or OTHER_SPLIT.search(str(path))):  # most are settings
            others[str(path.parent if place != folder and _is_saved(place) else path)] = None
    if others:
        some, names = textwrap.shorten(", ".join(others), 100, placeholder=" ..."), ", ".join(map(repr, splits))
        warn(f"hub:{folder}: save_to_disk wrote {names}; not read: {some}; save all splits as one DatasetDict")


def saved_tables(folder: Path) -> list[Path]:
    """Return the files of a split that `save_to_disk` wrote."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / file["filename"] for file in state.get("_data_files") or ()]


def read_saved(folder: Path, labels: Iterable[str]) -> "Dataset":
    """Read a split that `save_to_disk` wrote. `load_from_disk` cannot read an empty one, which has no files."""
    import datasets

    features = datasets.DatasetInfo.from_directory(str(folder)).features
    paths = [path.relative_to(folder.parent) for path in saved_tables(folder)]
    if not paths:
        return empty(features)
    tables = {str(path): read_features(folder.parent, path) for path in paths}
    check_features({f"{folder.name}/dataset_info.json": features, **tables}, labels)
    return datasets.load_from_disk(str(folder)).with_format(None)


def empty(features: "Features") -> "Dataset":
    """Return a data set without rows."""
    import datasets

    return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
