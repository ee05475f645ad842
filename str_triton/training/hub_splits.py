"""Checks that the splits of a local data set share no examples: a test on examples of train shows no accuracy."""

import filecmp
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from str_triton.training.errors import warn

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 20  # about as many images or sounds of a split are compared
RIVALS = 100  # the most files of train that one of them is compared with


def check_copies_of_train(folder: Path, files: Mapping[str, list[Path]], tables: bool) -> None:
    """Check that no other split holds copies of the files of train, by their sizes and their content.

    All tables are compared. Of images and sounds a sample is compared: raise ValueError if all of it are copies, and
    warn if some are.
    """
    train: dict[int, list[Path]] = {}
    for path in files.get("train", []):
        train.setdefault(os.path.getsize(folder / path), []).append(path)
    for split, paths in files.items():
        some = [] if split == "train" else paths if tables else paths[:: max(1, len(paths) // SAMPLE)]
        found = {path: original for path in some if (original := _original(folder, path, train))}
        for path, original in list(found.items())[:1]:
            if tables or len(found) == len(some):
                raise ValueError(
                    f"{path} of the split {split!r} is a copy of {original} of 'train': a test needs other examples"
                )
            warn(
                f"hub:{folder}: of {len(some):,} files of {split!r} that were compared, {len(found):,} are copies of "
                f"files of 'train', such as {path} of {original}"
            )


def _original(folder: Path, path: Path, train: Mapping[int, list[Path]]) -> Path | None:
    same_size = train.get(os.path.getsize(folder / path), [])
    rivals = [other for other in same_size if other.name == path.name] + same_size
    return next((it for it in rivals[:RIVALS] if filecmp.cmp(folder / it, folder / path, shallow=False)), None)


def check_named_files(name: str, splits: "Mapping[str, Dataset]", column: str) -> None:
    """Raise ValueError if rows of train and of another split name the same file."""
    train = {os.path.normpath(path) for path in named_files(splits["train"], column)}
    for split, rows in splits.items():
        if train and split != "train":
            named = named_files(rows, column)
            if shared := [path for path in named if os.path.normpath(path) in train]:
                raise ValueError(
                    f"{name}: {len(shared):,} of the {len(named):,} files that {split!r} names are also in 'train', "
                    f"such as {shared[0]}: each file may be in one of them"
                )


def named_files(rows: "Dataset", column: str) -> list[str]:
    """Return the paths of the files that the rows of a column name. Rows that hold the content of files name none."""
    import pyarrow
    import pyarrow.compute

    values = rows.data.column(column)
    if pyarrow.types.is_struct(values.type):
        fields = {values.type.field(place).name for place in range(values.type.num_fields)}
        if "path" not in fields:
            return []
        content = values
        values = pyarrow.compute.struct_field(values, "path")
        if "bytes" in fields:
            values = values.filter(pyarrow.compute.is_null(pyarrow.compute.struct_field(content, "bytes")))
    if not str(values.type).endswith("string"):
        return []
    return [path for path in values.to_pylist() if path]
