"""The binary version of CIFAR-10: 60,000 photographs of 32 x 32 pixels in ten classes.

A. Krizhevsky, Learning multiple layers of features from tiny images, 2009. The authors also publish a version for
Python, whose files are pickles. Reading those can run code, so they are not read here.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from str_triton.cnn.data.arrays import ArrayImages, Augmentation, Normalisation
from str_triton.cnn.data.common import Data

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN, TEST = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",)
FOLDER = "cifar-10-batches-bin"  # in the published archive
SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32  # a label, then the pixels of red, green and blue
ROWS = 10_000  # of a published file


def load_cifar10(data_dir: str | None) -> Data:
    """Read data_batch_1.bin to data_batch_5.bin and test_batch.bin from `data_dir`, or from its cifar-10-batches-bin.

    Training images are shifted by up to four pixels and mirrored.

    Raises FileNotFoundError for a missing directory or file, and ValueError for damaged files.
    """
    if data_dir is None:
        raise ValueError("cifar10 needs --data-dir: the directory that holds data_batch_1.bin and the other five files")
    root = Path(data_dir) / FOLDER
    root = root if root.is_dir() else Path(data_dir)
    images, labels = _read(root, TRAIN)
    test_images, test_labels = _read(root, TEST)
    normalisation, augmentation = Normalisation.of(images), Augmentation(padding=4, flip=True)
    return Data(
        train=ArrayImages(images, labels, normalisation, augmentation),
        test=ArrayImages(test_images, test_labels, normalisation, augmentation),
        class_names=NAMES,
        image_shape=SHAPE,
        name="cifar10",
    )


def _read(root: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the images of some files, uint8 [N, 3, 32, 32], and their labels, int64 [N]."""
    if missing := [name for name in names if not (root / name).is_file()]:
        raise FileNotFoundError(
            f"{root}: no {missing[0]}; unpack CIFAR-10's binary version (cifar-10-binary.tar.gz) and name its folder"
        )
    rows = torch.cat([_rows(root / name) for name in names])
    return rows[:, 1:].reshape(-1, *SHAPE).contiguous(), rows[:, 0].long()


def _rows(path: Path) -> Tensor:
    """Return the rows of a file, uint8 [N, ROW]."""
    size = path.stat().st_size
    if size == 0 or size % ROW or size > ROWS * ROW:
        raise ValueError(f"{path}: {size:,} bytes, not {ROWS:,} x {ROW:,}: damaged; unpack the archive again")
    rows = torch.from_numpy(np.fromfile(path, np.uint8)).view(-1, ROW)
    if int(rows[:, 0].max()) >= len(NAMES):
        raise ValueError(f"{path}: the label {int(rows[:, 0].max())}, but labels run from 0 to 9: damaged")
    return rows
