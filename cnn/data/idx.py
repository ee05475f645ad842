"""MNIST and other data sets in its format: IDX files, gzipped or not."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from str_triton.cnn.data.arrays import ArrayImages, Augmentation, Normalisation
from str_triton.cnn.data.common import Data

LARGEST = 2**32
"""The largest file to read, in bytes. The largest published one, of EMNIST by class, has 0.6 x 10^9."""


@dataclass(frozen=True)
class Published:
    """A published data set: its classes, the prefixes of its file names, and how to treat its images."""

    class_names: tuple[str, ...]
    first_label: int = 0
    train: str = "train"
    test: str = "t10k"
    flip: bool = False
    transposed: bool = False


def _emnist(split: str, class_names: Iterable[str], first_label: int = 0) -> Published:
    return Published(tuple(class_names), first_label, f"emnist-{split}-train", f"emnist-{split}-test", transposed=True)


MERGED = digits + ascii_uppercase + "abdefghnqrt"  # the letters whose cases EMNIST keeps apart
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SETS = {
    "mnist": Published(tuple(digits)),
    "fashion-mnist": Published(FASHION, flip=True),
    "kmnist": Published(("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "emnist:balanced": _emnist("balanced", MERGED),
    "emnist:byclass": _emnist("byclass", digits + ascii_uppercase + ascii_lowercase),
    "emnist:bymerge": _emnist("bymerge", MERGED),
    "emnist:digits": _emnist("digits", digits),
    "emnist:letters": _emnist("letters", ascii_uppercase, first_label=1),
    "emnist:mnist": _emnist("mnist", digits),
}


def load_idx(name: str, data_dir: str | None) -> Data:
    """Read the four files of the data set `name` from `data_dir`. "emnist" means the only split in that directory.

    Raises FileNotFoundError for a missing directory or file, and ValueError for damaged or wrong files.
    """
    if data_dir is None:
        raise ValueError(f"{name} needs --data-dir: the directory that holds its IDX files")
    directory = Path(data_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; --data-dir names the one that holds the IDX files")
    if name == "emnist":
        name = _only_emnist_split(directory)
    published = SETS[name]
    train, test = _pair_of(directory, published.train), _pair_of(directory, published.test)
    train_images, train_labels = _read_pair(*train, published)
    test_images, test_labels = _read_pair(*test, published)
    if train_images.shape[1:] != test_images.shape[1:]:
        sizes = " and ".join(f"{height}x{width}" for _, _, height, width in (train_images.shape, test_images.shape))
        raise ValueError(f"{directory}: training and test images differ in size ({sizes}): take both from one data set")
    _, channels, height, width = train_images.shape
    normalisation, augmentation = Normalisation.of(train_images), Augmentation(padding=2, flip=published.flip)
    return Data(
        train=ArrayImages(train_images, train_labels, normalisation, augmentation),
        test=ArrayImages(test_images, test_labels, normalisation, augmentation),
        class_names=published.class_names,
        image_shape=(channels, height, width),
        name=name,
    )


def _only_emnist_split(directory: Path) -> str:
    splits = [name for name in SETS if name.startswith("emnist:") and _find(directory, SETS[name].train, "images", 3)]
    if not splits:
        raise FileNotFoundError(
            f"{directory}: no emnist-SPLIT-train-images-idx3-ubyte[.gz]; put EMNIST's IDX files there"
        )
    if len(splits) > 1:
        raise ValueError(f"{directory} holds several splits of EMNIST; choose one: --data {' or '.join(splits)}")
    return splits[0]


def _find(directory: Path, part: str, kind: str, dimensions: int) -> Path | None:
    """Return the file of a part ("train") and a kind ("images") under any of the names in use, or None."""
    stems = [f"{part}-{kind}{separator}idx{dimensions}-ubyte" for separator in "-."]
    candidates = [directory / (stem + ending) for stem in stems for ending in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def _pair_of(directory: Path, part: str) -> tuple[Path, Path]:
    """Return the paths of the images and the labels of a part."""
    found = []
    for kind, dimensions in (("images", 3), ("labels", 1)):
        path = _find(directory, part, kind, dimensions)
        if path is None:
            wanted = f"{part}-{kind}-idx{dimensions}-ubyte"
            raise FileNotFoundError(f"{directory}: no {wanted} or {wanted}.gz; put the four IDX files there")
        found.append(path)
    return found[0], found[1]


def _read_pair(images_path: Path, labels_path: Path, published: Published) -> tuple[Tensor, Tensor]:
    """Return the images of a part, uint8 [N, 1, H, W], and its labels, int64 [N] from 0."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).long()
    if images.numel() == 0:
        raise ValueError(f"{images_path}: zero images (its dimensions are {' x '.join(map(str, images.shape))})")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels; "
            "take both from the same data set"
        )
    first, last = published.first_label, published.first_label + len(published.class_names) - 1
    low, high = int(labels.min()), int(labels.max())
    if low < first or high > last:
        raise ValueError(
            f"{labels_path}: labels run from {low} to {high}, but this data set's from {first} to {last}; "
            "check that --data names the right one"
        )
    if published.transposed:
        images = images.transpose(1, 2).contiguous()
    return images[:, None], labels - first


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Return the uint8 array in an IDX file, gzipped or not. Raise ValueError, which names the file, if it is damaged.

    The format: 0, 0, 8 for unsigned bytes, the number of dimensions, each dimension as a big-endian uint32, the data.
    At most the number of bytes in the header, and at most `LARGEST` bytes, are unpacked.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return _array(gzip.GzipFile(fileobj=file) if packed else file, path, dimensions)
    except EOFError:
        raise ValueError(f"{path}: truncated: its compressed data end too soon; download it again") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged: {error}; download it again") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _array(file: gzip.GzipFile | BinaryIO, path: Path, dimensions: int) -> Tensor:
    header = file.read(4 + 4 * dimensions)
    if header[:4] != bytes((0, 0, 8, dimensions)) and len(header) >= 4:
        raise ValueError(
            f"{path}: begins with the bytes {header[:4].hex(' ')}, not 00 00 08 {dimensions:02x}; "
            f"this is not an IDX file of unsigned bytes in {dimensions} dimension{'s' * (dimensions > 1)}"
        )
    if len(header) < 4 + 4 * dimensions:
        raise ValueError(
            f"{path}: truncated: {len(header)} bytes, and the header alone has {4 + 4 * dimensions}; download it again"
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    expected, size = math.prod(shape), " x ".join(map(str, shape))
    if expected > LARGEST:
        raise ValueError(f"{path}: damaged: its header says {size} bytes, more than {LARGEST:,}; download it again")
    content = file.read(expected + 1)  # one more byte: gzip checks its checksum only at the end of the file
    if len(content) != expected:
        what = f"truncated: {len(content)} follow" if len(content) < expected else "more follow"
        raise ValueError(f"{path}: its header says {size} = {expected} bytes, {what}; download it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())
