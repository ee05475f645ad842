"""Data sets of the Hugging Face hub, and local folders in their format."""

import os
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from str_triton.cnn.data.common import Data, NetworkInput, OnCorrupt, stratified_split
from str_triton.cnn.data.counter_random import order_keys
from str_triton.cnn.data.encoded import encoded_data
from str_triton.training.errors import warn
from str_triton.training.hub import local_folder, read_splits
from str_triton.training.hub_features import check_names, class_names, one_column
from str_triton.training.hub_splits import check_named_files

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
PART_COLUMNS = ("split", "fold", "subset", "partition")  # which may say what rows are for testing; they are not used


@dataclass(frozen=True, eq=False)
class Column:
    """The encoded images of a split.

    `rows` has one column and is memory-mapped: worker processes share its pages, and only the pages that are needed
    are read. Its format is "arrow", in which reading a row takes a third of the time of Python objects.
    """

    rows: "Dataset"
    name: str
    root: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[str, str | bytes]:
        value, name = self.rows[index].column(0)[0].as_py(), f"{self.name}[{index}]"
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            name = f"{name} ({path})" if path else name
            if value is None and path:
                return name, os.path.join(self.root, path)
        if isinstance(value, str):
            return f"{name} ({value})", os.path.join(self.root, value)
        if not isinstance(value, bytes):
            column = self.rows.column_names[0]
            raise ValueError(f"{name}: column {column!r} has neither the bytes nor the path of an image")
        return name, value


def load_hub(
    place: str, on_corrupt: OnCorrupt = None, image_size: int | None = None, taken_by: NetworkInput | None = None
) -> Data:
    """Read `NAME` or `NAME:CONFIGURATION`, where NAME is a data set of the hub or a local folder.

    A local folder holds parquet, arrow, csv or json files, images in folders of classes or beside a table of metadata,
    or the output of `save_to_disk`.

    The columns are image (or img) and label (or labels, fine_label). The splits are train and test, or validation (or
    valid, val, dev, eval) where test is missing or hides its labels. Without any of these, a fifth of each class of
    train is held out, always the same. Images are stored as bytes, or as paths below the local folder. Labels are whole
    numbers from 0, or booleans.

    Parquet files are converted once to Arrow files below HF_DATASETS_CACHE, which need about as much disk space again.
    Files that have changed or moved are converted anew: old conversions in its folder str_triton may be deleted.
    Folders of `save_to_disk` are memory-mapped in place. Images are read in random order: keep them on a fast disk.
    For `taken_by` see `load`.

    Raises ValueError, in one line, also for errors of the `datasets` library.
    """
    splits = read_splits(place, ":", ("train", *TEST_SPLITS), LABEL_COLUMNS)
    name = f"hub:{place}"
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train', only {', '.join(map(repr, splits)) or 'none'}")
    train = splits["train"]
    if len(train) == 0:
        raise ValueError(f"{name}: zero images in its split 'train'")
    image = one_column(IMAGE_COLUMNS, train.column_names, f"{name} train")
    label = one_column(LABEL_COLUMNS, train.column_names, f"{name} train")
    labels = _labels(train, label, f"{name} train")
    classes = class_names(train.features[label]) or _numbered(labels, f"{name} train")
    if len(classes) < 2 or int(labels.min()) == int(labels.max()):
        raise ValueError(f"{name} train: all labels are {int(labels[0])}; training needs at least two classes")
    held_out = _held_out(splits, label, name)
    if held_out is None:
        others = [f"{part!r} ({len(splits[part]):,} rows)" for part in splits if part != "train"]
        others += [f"column {part!r}" for part in train.column_names if part.lower() in PART_COLUMNS]
        if others:
            warn(f"{name}: a fifth of 'train' is held out as the test; not read: {', '.join(others)}")
        kept, taken = stratified_split(labels, order_keys(len(labels), 0, 0), classes)
        test, test_labels, test_name = train.select(taken.tolist()), labels[taken], f"{name} train, held out"
        train, labels = train.select(kept.tolist()), labels[kept]
    else:
        test, test_labels, test_name = splits[held_out[0]], held_out[1], f"{name} {held_out[0]}"
        named = class_names(test.features[label])
        if named is not None:
            check_names(f"{name} train", classes, test_name, named)
        one_column((image,), test.column_names, test_name)
        check_named_files(name, {"train": train, held_out[0]: test}, image)
    for part, numbers in ((f"{name} train", labels), (test_name, test_labels)):
        if numbers.min() < 0 or numbers.max() >= len(classes):
            low, high = int(numbers.min()), int(numbers.max())
            raise ValueError(f"{part}: labels run from {low} to {high}, the classes from 0 to {len(classes) - 1}")
    if held_out is not None:
        _check_classes(labels, test_labels, classes, name, held_out[0])
    root, _ = local_folder(place, ":") or ("", "")
    sources = [
        Column(_encoded(rows, image), part, str(root)) for rows, part in ((train, f"{name} train"), (test, test_name))
    ]
    return encoded_data(
        sources[0], labels, sources[1], test_labels, tuple(classes), name, on_corrupt, image_size, taken_by
    )


def _labels(rows: "Dataset", column: str, place: str) -> Tensor:
    """Return the labels of a split, int64 [N]."""
    values = rows.select_columns([column]).with_format("arrow")[:].column(0)
    kind = str(values.type)
    if values.null_count:
        row = values.to_pylist().index(None)
        raise ValueError(f"{place}: column {column!r} holds None in row {row:,}: remove the rows without a label")
    if not kind.startswith(("int", "uint", "bool")):
        advice = ""
        if kind.endswith("string"):
            advice = f": number the classes, or convert the texts with class_encode_column({column!r}) of datasets"
        elif kind in ("half", "float", "double"):
            advice = ": write them without a point, or change their type to int64"
        odd = repr(values[0].as_py())[:40]
        raise ValueError(f"{place}: column {column!r} holds {odd}; labels must be whole numbers from 0{advice}")
    return torch.from_numpy(values.to_numpy().astype(np.int64))


def _numbered(labels: Tensor, place: str) -> list[str]:
    """Return names for the classes from 0 to the largest label. Raise ValueError where most of them have no image."""
    if labels.min() < 0:
        count = int((labels < 0).sum())
        raise ValueError(
            f"{place}: {count:,} of {len(labels):,} labels are negative, such as {int(labels.min())}: remove them"
        )
    count, used = int(labels.max()) + 1, len(labels.unique())
    if used * 2 < count:
        raise ValueError(
            f"{place}: labels run to {count - 1:,}, but only {used:,} different ones occur: number them from 0"
        )
    if used < count:
        warn(f"{place}: {count - used} of the {count} classes from 0 to {count - 1} have no images")
    return [str(number) for number in range(count)]


def _check_classes(train: Tensor, test: Tensor, classes: list[str], name: str, split: str) -> None:
    """Raise ValueError if the test has classes that train lacks; warn of classes that the test lacks."""
    ours, theirs = set(train.tolist()), set(test.tolist())
    if new := sorted(theirs - ours):
        raise ValueError(
            f"{name}: {split!r} has the class {classes[new[0]]!r} (label {new[0]}), of which 'train' has no image: "
            "number the classes of both alike"
        )
    if lacking := sorted(ours - theirs):
        some = textwrap.shorten(", ".join(repr(classes[number]) for number in lacking), 100, placeholder=" ...")
        warn(f"{name}: {split!r} has no image of {len(lacking):,} of the {len(ours):,} classes of 'train': {some}")


def _held_out(splits: "DatasetDict | dict[str, Dataset]", label: str, name: str) -> tuple[str, Tensor] | None:
    """Return the split to test on and its labels. Skip splits without labels or with equal ones, as of competitions."""
    parts = [split for split in TEST_SPLITS if split in splits and len(splits[split])]
    labelled = [split for split in parts if _has_values(splits[split], label)]
    for split in labelled or parts:
        one_column((label,), splits[split].column_names, f"{name} {split}")
        labels = _labels(splits[split], label, f"{name} {split}")
        if (labels != labels[0]).any() or (len(labels) == 1 and labels[0] != -1):
            return split, labels
        if labels[0] != -1:
            warn(f"{name}: {split!r} is not read: all its labels are {int(labels[0])}, as if they were hidden")
    return None


def _has_values(rows: "Dataset", column: str) -> bool:
    return column in rows.column_names and rows.data.column(column).null_count < len(rows.data)


def _encoded(rows: "Dataset", column: str) -> "Dataset":
    """Return a data set with only that column, whose images are not decoded."""
    import datasets

    rows = rows.select_columns([column])
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows.with_format("arrow")
