"""A folder of images: one folder per class."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn.data.common import Data, OnCorrupt, stratified_split
from cnn.data.encoded import encoded_data

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below `root`.

    `paths`, uint8 [N, L], holds them filled up with zeros: every worker process shares the one tensor, however it is
    started, while it would copy a list of a million strings.
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


def load_folder(place: str, on_corrupt: OnCorrupt = None) -> Data:
    """Read DIR/train/CLASS/ and DIR/val/CLASS/ (or test), images at any depth below; DIR/CLASS/ is split 80/20 by name.

    Classes are the folders' names in alphabetical order. Hidden files and files with other endings are passed over. The
    split sorts each class by a hash of the path below DIR, so it is the same everywhere, whatever the training's seed.
    Raises FileNotFoundError or ValueError for a folder that does not look like that, and for unreadable images.
    """
    root = Path(place)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory; --data imagefolder:DIR takes one with a folder per class")
    parts = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    name = f"imagefolder:{place}"
    if not parts:
        classes, paths, labels = _listing(root)
        keys = torch.tensor([_key(path) for path in paths])
        train, test = stratified_split(labels, keys, classes)
        chosen = [Files.of(root, [paths[index] for index in indices]) for indices in (train.tolist(), test.tolist())]
        return encoded_data(chosen[0], labels[train], chosen[1], labels[test], len(classes), name, on_corrupt)
    if "train" not in parts:
        raise ValueError(
            f"{root} has {parts[0]} but no train: put the training images of each class in {root}/train/CLASS"
        )
    if len(parts) == 1:
        raise ValueError(
            f"{root} has train but neither val nor test: add one, or hold out a fifth by naming {root}/train"
        )
    held_out = parts[1]
    classes, paths, labels = _listing(root / "train")
    test_classes, test_paths, test_labels = _listing(root / held_out)
    if missing := sorted(set(classes) ^ set(test_classes)):
        lacking = held_out if missing[0] in classes else "train"
        raise ValueError(f"{root / lacking} lacks the class {missing[0]!r}; train and {held_out} need the same classes")
    train, test = Files.of(root / "train", paths), Files.of(root / held_out, test_paths)
    return encoded_data(train, labels, test, test_labels, len(classes), name, on_corrupt)


def _listing(root: Path) -> tuple[list[str], list[str], Tensor]:
    """The class names, the images' paths below `root` in alphabetical order, and their labels, int64."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise ValueError(f"{root}: needs a folder for each of at least two classes, has {found}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        members = sorted(_images(root, name))
        if not members:
            raise ValueError(f"{root / name}: zero images (files ending in {' '.join(ENDINGS)}) in this class")
        paths += members
        labels += [label] * len(members)
    return classes, paths, torch.tensor(labels)


def _images(root: Path, name: str) -> list[str]:
    found = []
    for directory, folders, files in os.walk(root / name, followlinks=True):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        inside = os.path.relpath(directory, root)
        found += [
            os.path.join(inside, file) for file in files if not file.startswith(".") and file.lower().endswith(ENDINGS)
        ]
    return found


def _key(path: str) -> int:
    """64 bits of the path's hash, as an int64; the same on systems that part folders by a backslash."""
    digest = hashlib.blake2b(os.fsencode(path.replace(os.sep, "/")), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
