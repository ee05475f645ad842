"""Images stored as files or bytes (JPEG, PNG, ...) and decoded for each batch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from str_triton.cnn.data.arrays import ArrayImages, Augmentation, Normalisation
from str_triton.cnn.data.common import Data, NetworkInput, OnCorrupt
from str_triton.cnn.data.counter_random import uniforms
from str_triton.cnn.data.decoding import (
    CROP_DRAWS,
    TEST_SHARE_OF_SIDE,
    crop_of,
    decode,
    opened,
    random_crop,
    upright_size,
)
from str_triton.training.errors import warn
from str_triton.training.fingerprint import Fingerprint

SMALL = 64
"""A data set of small images, most at most this wide and high, keeps its size and is held in memory if it fits."""
LARGE = 224
"""The images of all other data sets are cropped and scaled to squares of this size."""
SAMPLES = 100
"""The number of training images, evenly spread, that decide on the size and on whether the images have colour."""
MEMORY = 2**30
"""The largest number of bytes of pixels, training and test together, to hold in memory."""
HASHED = 2**20
"""The number of bytes of a file that its hash reads at most."""
MAX_CORRUPT_IN_A_ROW = 100
"""The number of corrupt images in a row after which reading stops: something else is wrong."""
GREY = ("1", "L", "LA", "La")
IMAGENET = Normalisation(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))


class Source(Protocol):
    """Encoded images by number, with names for error messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, str | bytes]:
        """Return an image's name, and the path or the bytes of its file."""
        ...


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images decoded on demand: RGB or, with one channel, grey, of `size` (height, width); `labels` int64 [N].

    See `common.Images`. With `crop`, for large images, training takes random crops, and testing the central one of that
    share. Small images are used whole.
    """

    source: Source
    labels: Tensor
    size: tuple[int, int]
    crop: float | None
    augmentation: Augmentation
    normalisation: Normalisation = IMAGENET
    channels: int = 3

    in_memory = False

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(self.labels, self._stored)

    def _stored(self, index: int) -> bytes | None:
        """Return the first bytes of an image's file; None if it cannot be read or decoded."""
        try:
            name, stored = self.source.read(index)
            decode(name, stored, self.size, crop_of(self.crop))
            if isinstance(stored, bytes):
                return stored[:HASHED]
            with open(stored, "rb") as file:
                return file.read(HASHED)
        except (OSError, ValueError):
            return None

    def batch(
        self, indices: Tensor, *, seed: int, epoch: int, augment: bool, on_corrupt: OnCorrupt = None
    ) -> tuple[Tensor, Tensor]:
        draws = uniforms(seed, epoch, indices, Augmentation.DRAWS + CROP_DRAWS if self.crop else Augmentation.DRAWS)
        images = np.empty((len(indices), *self.size, self.channels), np.uint8)
        taken = indices.clone()
        for place, (index, own) in enumerate(zip(indices.tolist(), draws.T.tolist(), strict=True)):
            taken[place] = self._decode_into(images[place], index, own if augment else None, on_corrupt)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        if augment and not self.crop:
            pixels = self.augmentation(pixels, draws)
        if not augment and not torch.equal(taken, indices):
            kept = taken == indices
            pixels, taken = pixels[kept], taken[kept]
        return pixels, self.labels[taken]

    def _decode_into(self, image: np.ndarray, index: int, draws: Sequence[float] | None, on_corrupt: OnCorrupt) -> int:
        """Decode image number `index`, or the next one that is not corrupt, into `image`, and return its number."""
        choose, mirror = crop_of(self.crop), False
        if self.crop and draws is not None:
            choose = partial(random_crop, draws=draws[Augmentation.DRAWS :])
            mirror = self.augmentation.mirrors(draws)

        tries = min(MAX_CORRUPT_IN_A_ROW, len(self))
        for number in range(index, index + tries):
            number %= len(self)
            try:
                image[:] = decode(*self.source.read(number), self.size, choose, mirror=mirror, channels=self.channels)
                return number
            except ValueError as error:
                if on_corrupt is None:
                    raise
                on_corrupt(str(error))
                last = error
        raise ValueError(f"{tries} images in a row cannot be read; the last: {last}")


def encoded_data(
    train: Source,
    train_labels: Tensor,
    test: Source,
    test_labels: Tensor,
    class_names: tuple[str, ...],
    name: str,
    on_corrupt: OnCorrupt = None,
    image_size: int | None = None,
    taken_by: NetworkInput | None = None,
) -> Data:
    """Return the data set of two sources of encoded images.

    With `taken_by` that network decides on size, crop, channels and normalisation, and no image is read. Otherwise the
    images decide as follows.

    The majority of the training images decides on the size, unless `image_size` gives it. Small images are shifted at
    random by up to an eighth of their height, large ones are cropped at random. Images are mirrored if the majority has
    colour: grey images are often writing, which must not be mirrored. A warning is printed where images differ in kind
    or size from the majority. With `on_corrupt`, images that cannot be decoded do not count in the majority and are
    left out of images held in memory.
    """
    if taken_by is not None:
        size, crop = (taken_by.images.height, taken_by.images.width), taken_by.images.crop
        channels, normalisation = taken_by.images.channels, taken_by.normalisation
        augmentation, hold = Augmentation(), False
    else:
        small, size, coloured = _majority(train, name, on_corrupt, image_size)
        crop = None if small else TEST_SHARE_OF_SIDE
        augmentation = Augmentation(padding=size[0] // 8 if small else 0, flip=coloured)
        hold = small and (len(train_labels) + len(test_labels)) * 3 * size[0] * size[1] <= MEMORY
        channels, normalisation = 3, IMAGENET
    sets = [
        EncodedImages(source, labels, size, crop, augmentation, normalisation, channels)
        for source, labels in ((train, train_labels), (test, test_labels))
    ]
    left_out: tuple[str, ...] = ()
    if hold:
        corrupt: tuple[list[str], list[str]] = [], []
        parts = [
            images.batch(
                torch.arange(len(images)), seed=0, epoch=0, augment=False, on_corrupt=on_corrupt and lines.append
            )
            for images, lines in zip(sets, corrupt, strict=True)
        ]
        for line in (*corrupt[0], *corrupt[1]):
            on_corrupt(line)
        left_out = tuple(dict.fromkeys(corrupt[1]))
        normalisation = Normalisation.of(parts[0][0])
        sets = [
            ArrayImages(pixels.contiguous(), labels, normalisation, augmentation, images)
            for (pixels, labels), images in zip(parts, sets, strict=True)
        ]
    return Data(sets[0], sets[1], class_names, (channels, *size), name, crop, left_out)


def _majority(
    source: Source, name: str, on_corrupt: OnCorrupt, image_size: int | None
) -> tuple[bool, tuple[int, int], bool]:
    """Return whether most images are small, the (height, width) to read all of them at, and whether most have colour.

    Only the headers of `SAMPLES` images are read. The size of small images is the most frequent one.
    """
    count = min(SAMPLES, len(source))
    sizes, coloured = Counter[tuple[int, int]](), 0
    for place in range(count):
        try:
            with opened(*source.read(place * len(source) // count)) as image:
                width, height = upright_size(image)
                sizes[height, width] += 1
                coloured += image.mode not in GREY and not image.mode.startswith("I")
        except ValueError as error:
            if on_corrupt is None:
                raise
            on_corrupt(str(error))
            last = error
    readable = sizes.total()
    if readable == 0:
        raise ValueError(f"none of {count} images can be read; the last: {last}")
    small = {size: number for size, number in sizes.items() if max(size) <= SMALL}
    among = sum(small.values())
    is_small = among > readable // 2
    size = max(small, key=lambda own: (small[own], own)) if is_small else (LARGE, LARGE)
    if image_size is not None:
        return is_small, (image_size, image_size), coloured > readable // 2
    if (is_small and small[size] < readable) or (not is_small and small):
        warn(
            f"{name}: of {readable} sampled images, {among} are at most {SMALL} pixels wide and high"
            + (f", and {small[size]} are {size[1]}x{size[0]}" if is_small else "")
            + f"; all are scaled to {size[1]}x{size[0]}"
        )
    return is_small, size, coloured > readable // 2
