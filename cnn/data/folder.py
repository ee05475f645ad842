"""Image folders with one folder per class."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from str_triton.cnn.data.common import Data, NetworkInput, OnCorrupt, stratified_split
from str_triton.cnn.data.encoded import encoded_data
from str_triton.training.errors import warn

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The names, in lower case, of folders that are parts of a data set."""
LEFTOVERS = (
    *("__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
    *("thumbs.db", "desktop.ini"),
)
"""The names, in lower case, of folders and files that archives and operating systems leave beside images."""


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below `root`.

    `paths`, uint8 [N, L], holds the paths padded with zeros. Worker processes share this tensor, however they are
    started; a list of a million strings would be copied to each.
    """

    root: str
    paths: Tensor

    @classmethod
    def of(cls, root: Path, paths: Sequence[str]) -> "Files":
        table = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        return cls(str(root), torch.from_numpy(table.view(np.uint8).reshape(len(table), -1)))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[str, str]:
        path = os.path.join(self.root, os.fsdecode(self.paths[index].numpy().tobytes().rstrip(b"\0")))
        return path, path


def load_folder(
    place: str, on_corrupt: OnCorrupt = None, image_size: int | None = None, taken_by: NetworkInput | None = None
) -> Data:
    """Read DIR/train/CLASS/ and DIR/val/CLASS/ (or test), or split DIR/CLASS/ 80/20 by name.

    Images may lie at any depth below their class. Classes are the folders' names in alphabetical order. Links are
    followed, except those that lead back to a folder above. Hidden files and folders are skipped, and so are those of
    `LEFTOVERS`. A warning gives the number of skipped files that do not end like an image, and of circular links. The
    split sorts each class by a hash of the path below DIR, so it is the same everywhere, whatever the training's seed.
    For `taken_by` see `load`.

    Raises FileNotFoundError or ValueError for another layout of the folder, and for unreadable images.
    """
    root = Path(place)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory; --data imagefolder:DIR takes one with a folder per class")
    parts, name = _parts(root), f"imagefolder:{place}"
    skipped = Counter[str]()
    classes, train, test = _read_parts(root, parts, skipped) if parts else _split(root, skipped)
    data = encoded_data(*train, *test, tuple(classes), name, on_corrupt, image_size, taken_by)
    if skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common(8))
        warn(f"{name}: skipped, not images: {kinds}")
    return data


Part = tuple[Files, Tensor]


def _split(root: Path, skipped: Counter[str]) -> tuple[list[str], Part, Part]:
    """Return the classes of DIR/CLASS/, and a training and a test set with their labels."""
    classes, paths, labels = _listing(root, skipped)
    keys = torch.tensor([_key(path) for path in paths])
    train, test = (
        (Files.of(root, [paths[index] for index in indices.tolist()]), labels[indices])
        for indices in stratified_split(labels, keys, classes)
    )
    return classes, train, test


def _read_parts(root: Path, parts: dict[str, str], skipped: Counter[str]) -> tuple[list[str], Part, Part]:
    """Return the classes of DIR/train/CLASS/, the training set, and the test set of DIR/val/CLASS/ (or test)."""
    train, held_out = parts.get("train"), parts.get("val") or parts.get("test")
    if train is None:
        raise ValueError(
            f"{root} has {held_out} but no train: put the training images of each class in {root}/train/CLASS"
        )
    if held_out is None:
        raise ValueError(
            f"{root} has {train} but neither val nor test: add one, or hold out a fifth by naming {root / train}"
        )
    classes, paths, labels = _listing(root / train, skipped)
    test_classes, test_paths, test_labels = _listing(root / held_out, skipped)
    if missing := sorted(set(classes) ^ set(test_classes)):
        lacking = held_out if missing[0] in classes else train
        raise ValueError(
            f"{root / lacking} lacks the class {missing[0]!r}; {train} and {held_out} need the same classes"
        )
    return classes, (Files.of(root / train, paths), labels), (Files.of(root / held_out, test_paths), test_labels)


def _parts(root: Path) -> dict[str, str]:
    """Return the names of the folders of `root` that are parts of a data set, by part ("train", "val", "test")."""
    parts: dict[str, str] = {}
    for name in sorted(_folders(root)):
        part = PARTS.get(name.lower())
        if part in parts:
            raise ValueError(f"{root} has {parts[part]} and {name}: which of them holds the {part} images? Rename one")
        if part is not None:
            parts[part] = name
    return parts


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if entry.is_dir() and _counts(entry.name)]


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in LEFTOVERS


def _listing(root: Path, skipped: Counter[str]) -> tuple[list[str], list[str], Tensor]:
    """Return the class names, the images' paths below `root` in alphabetical order, and their labels, int64."""
    classes = sorted(_folders(root))
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        inner = len(classes) == 1 and len(_folders(root / classes[0])) > 1
        advice = f"; if its folders are the classes, name {root / classes[0]}" if inner else ""
        raise ValueError(f"{root}: needs a folder for each of at least two classes, has {found}{advice}")
    if all(PARTS.keys() & re.findall("[a-z]+", name.lower()) for name in classes):
        names = ", ".join(map(repr, classes))
        raise ValueError(
            f"{root}: the folders {names} look like parts of a data set: name them train and val (or test)"
        )
    _warn_of_nested(root, classes)
    paths, labels = [], []
    for label, name in enumerate(classes):
        members = sorted(_images(root / name, name, [_identity(root)], skipped))
        if not members:
            raise ValueError(f"{root / name}: zero images (files ending in {' '.join(ENDINGS)}) in this class")
        paths += members
        labels += [label] * len(members)
    return classes, paths, torch.tensor(labels)


def _warn_of_nested(root: Path, classes: Sequence[str]) -> None:
    """Warn where all classes hold the same folders, which may then be the real classes."""
    names = sorted(_folders(root / classes[0]))
    if len(names) > 1 and all(sorted(_folders(root / name)) == names for name in classes[1:]):
        warn(
            f"{root}: the classes are {_some(classes)}, and each holds the folders {_some(names)}; if those are the "
            f"classes, name {root / classes[0]} instead"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def images_below(folder: Path) -> list[str]:
    """Return the paths of the images in a folder at any depth, in alphabetical order. See `load_folder`."""
    return sorted(os.path.join(folder, path) for path in _images(folder, "", [], Counter()))


def _images(folder: Path, relative: str, above: list[tuple[int, int]], skipped: Counter[str]) -> Iterator[str]:
    """Yield the paths of the images in a folder, each beginning with `relative`. `above` are the folders above it."""
    own = _identity(folder)
    if own in above:
        skipped["circular links"] += 1
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if not _counts(entry.name):
                continue
            if entry.is_dir():
                yield from _images(folder / entry.name, path, [*above, own], skipped)
            elif not entry.name.lower().endswith(ENDINGS):
                skipped[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
            elif entry.is_file() or entry.is_symlink():  # a broken link is reported as a corrupt image
                yield path
            else:
                skipped["pipes and devices"] += 1


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _key(path: str) -> int:
    """Return 64 bits of the path's hash as an int64. It is the same on systems that separate folders by a backslash."""
    digest = hashlib.blake2b(os.fsencode(path.replace(os.sep, "/")), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
