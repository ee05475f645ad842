"""Images as files or bytes (JPEG, PNG, ...), decoded when a batch asks for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cnn.data.arrays import ArrayImages, Augmentation, Normalisation
from cnn.data.common import Data, OnCorrupt
from cnn.data.counter_random import uniforms
from cnn.data.decoding import CROP_DRAWS, centre, decode, opened, random_crop, upright_size, whole

SMALL = 64
"""Sets whose first image is at most so wide and high keep its size, and are held in memory if they fit."""
LARGE = 224
"""All others are cut and scaled to squares of this size."""
MEMORY = 2**30
"""Bytes of pixels, training and test together, that are held in memory at most."""
IN_A_ROW = 100
"""So many corrupt images one after the other are no longer skipped: something else is wrong."""
IMAGENET = Normalisation(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))

T = TypeVar("T")


class Source(Protocol):
    """Encoded images by number, and what to call them in an error."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, str | bytes]:
        """The image's name, and either the path of a file or the bytes of one."""
        ...


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images decoded on demand: RGB of `size` (height, width), `labels` int64 [N]. See `common.Images`.

    Large ones (`crop`) are trained on random crops and tested on the central one; small ones are taken whole.
    """

    source: Source
    labels: Tensor
    size: tuple[int, int]
    crop: bool
    augmentation: Augmentation

    in_memory = False
    normalisation = IMAGENET

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, indices: Tensor, *, seed: int, epoch: int, augment: bool, on_corrupt: OnCorrupt = None
    ) -> tuple[Tensor, Tensor]:
        draws = uniforms(seed, epoch, indices, Augmentation.DRAWS + CROP_DRAWS if self.crop else Augmentation.DRAWS)
        images = np.empty((len(indices), *self.size, 3), np.uint8)
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
        """Fill `image` with that of `index`, or with the next that is not corrupt, and return whose it is."""
        choose, mirror = whole, False
        if self.crop and draws is None:
            choose = centre
        elif self.crop:
            choose = partial(random_crop, draws=draws[Augmentation.DRAWS :])
            mirror = self.augmentation.mirrors(draws)

        def read(number: int) -> int:
            number %= len(self)
            image[:] = decode(*self.source.read(number), self.size, choose, mirror=mirror)
            return number

        tries = min(IN_A_ROW, len(self))
        return _first_readable(range(index, index + tries), read, on_corrupt, f"{tries} images in a row")


def encoded_data(
    train: Source,
    train_labels: Tensor,
    test: Source,
    test_labels: Tensor,
    num_classes: int,
    name: str,
    on_corrupt: OnCorrupt = None,
) -> Data:
    """The data set of two sources of encoded images; its first training image decides on the size.

    Small images are shifted by up to an eighth of their height, large ones cropped at random. Images are mirrored if
    the first one has colour: what is grey is often writing, which mirroring spoils. With `on_corrupt` the first one is
    the first that can be opened, and corrupt ones are left out of what is held in memory.
    """
    (width, height), coloured = _first_look(train, on_corrupt)
    small = max(width, height) <= SMALL
    size = (height, width) if small else (LARGE, LARGE)
    augmentation = Augmentation(padding=height // 8 if small else 0, flip=coloured)
    sets = [
        EncodedImages(source, labels, size, not small, augmentation)
        for source, labels in ((train, train_labels), (test, test_labels))
    ]
    if small and sum(map(len, sets)) * 3 * height * width <= MEMORY:
        parts = [
            images.batch(torch.arange(len(images)), seed=0, epoch=0, augment=False, on_corrupt=on_corrupt)
            for images in sets
        ]
        normalisation = Normalisation.of(parts[0][0])
        sets = [ArrayImages(pixels.contiguous(), labels, normalisation, augmentation) for pixels, labels in parts]
    return Data(sets[0], sets[1], num_classes, (3, *size), name)


def _first_look(source: Source, on_corrupt: OnCorrupt) -> tuple[tuple[int, int], bool]:
    """(width, height) of the first image, and whether it has colour."""

    def read(number: int) -> tuple[tuple[int, int], bool]:
        with opened(*source.read(number)) as image:
            return upright_size(image), image.mode not in ("1", "L", "LA") and not image.mode.startswith("I")

    tries = min(IN_A_ROW, len(source))
    return _first_readable(range(tries), read, on_corrupt, f"the first {tries} images")


def _first_readable(numbers: range, read: Callable[[int], T], on_corrupt: OnCorrupt, which: str) -> T:
    """What `read` gives for the first image that it can read; without `on_corrupt` that has to be the first of all."""
    for number in numbers:
        try:
            return read(number)
        except ValueError as error:
            if on_corrupt is None:
                raise
            on_corrupt(str(error))
            last = error
    raise ValueError(f"{which} cannot be read, at last {last}")
