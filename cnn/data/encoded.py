"""Images as files or bytes (JPEG, PNG, ...), decoded by Pillow when a batch asks for them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from cnn.data.arrays import ArrayImages, Augmentation, Normalisation
from cnn.data.common import Data
from cnn.data.counter_random import uniforms

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 64
"""Sets whose first image is at most so wide and high keep its size, and are held in memory if they fit."""
LARGE = 224
"""All others are cut and scaled to squares of this size."""
TEST_SHARE_OF_SIDE = 224 / 256
MEMORY = 2**30
"""Bytes of pixels, training and test together, that are held in memory at most."""
IMAGENET = Normalisation(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))

Box = tuple[float, float, float, float]
"""left, top, right, bottom, in pixels"""
EXIF_ORIENTATION = 0x0112


class Source(Protocol):
    """Encoded images by number, and what to call them in an error."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, str | bytes]:
        """The image's name, and either the path of a file or the bytes of one."""
        ...


@contextmanager
def _opened(name: str, content: str | bytes) -> "Iterator[Image]":
    """The image, lazily decoded; whatever goes wrong inside is the fault of its file, and one line says so."""
    import PIL.Image

    try:
        with PIL.Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
            yield image
    except Exception as error:  # damaged files make Pillow's decoders raise nearly everything, SyntaxError too
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: not a readable image ({cause}); replace or remove it") from error


def _upright_size(image: "Image") -> tuple[int, int]:
    """(width, height) as a viewer shows it; orientations 5 to 8 of a camera lie on the side."""
    return image.size[::-1] if image.getexif().get(EXIF_ORIENTATION, 1) >= 5 else image.size


def _to_rgb(image: "Image") -> "Image":
    import PIL.Image

    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}, have no known range")
    if image.mode == "P" and "transparency" in image.info:  # as Pillow demands; alpha is dropped
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(name: str, content: str | bytes, size: tuple[int, int], choose: Callable[[int, int], Box]) -> np.ndarray:
    """Decode an image, turn it upright, and scale the box that `choose(width, height)` names to `size` (height, width).

    Returns uint8 [height, width, 3]; grey, palette and CMYK images become RGB, alpha is dropped. Raises ValueError with
    `name` if it cannot be decoded.
    """
    import PIL.Image
    import PIL.ImageOps

    height, width = size
    with _opened(name, content) as image:
        full = _upright_size(image)
        box = choose(*full)
        scale = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
        if scale > 1:  # a JPEG can be decoded at 1/2, 1/4, 1/8 of its size, in a fraction of the time
            image.draft(None, (math.ceil(image.size[0] / scale), math.ceil(image.size[1] / scale)))
        upright = _to_rgb(PIL.ImageOps.exif_transpose(image))
        factors = (upright.size[0] / full[0], upright.size[1] / full[1]) * 2
        scaled = tuple(edge * factor for edge, factor in zip(box, factors, strict=True))
        return np.asarray(upright.resize((width, height), PIL.Image.Resampling.BILINEAR, box=scaled))


def whole(width: int, height: int) -> Box:
    """All of the image."""
    return 0, 0, width, height


def centre(width: int, height: int) -> Box:
    """The square in the middle that is left of resizing to 256 and cropping 224."""
    side = TEST_SHARE_OF_SIDE * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def random_crop(width: int, height: int, draws: Tensor) -> Box:
    """8 % to 100 % of the area at an aspect from 3:4 to 4:3, cut to the image's sides where it would exceed them.

    draws: four numbers in [0, 1): area, aspect, and the position across and down.
    """
    area, aspect, across, down = draws.tolist()
    area = (0.08 + 0.92 * area) * width * height
    aspect = (3 / 4) ** (1 - 2 * aspect)
    crop_width, crop_height = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = across * (width - crop_width), down * (height - crop_height)
    return left, top, left + crop_width, top + crop_height


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

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Tensor, crop_draws: Tensor | None = None) -> Tensor:
        """uint8 [B, 3, H, W], not yet augmented or normalised; crop_draws: [4, B], None for the central crop."""
        images = np.empty((len(indices), *self.size, 3), np.uint8)
        for place, index in enumerate(indices.tolist()):
            choose = whole
            if self.crop:
                choose = centre if crop_draws is None else partial(random_crop, draws=crop_draws[:, place])
            images[place] = decode(*self.source.read(index), self.size, choose)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def batch(self, indices: Tensor, *, seed: int, epoch: int, augment: bool) -> tuple[Tensor, Tensor]:
        if augment:
            draws = uniforms(seed, epoch, indices, Augmentation.DRAWS + 4)
            images = self.augmentation(self.pixels(indices, draws[Augmentation.DRAWS :]), draws)
        else:
            images = self.pixels(indices)
        return IMAGENET(images), self.labels[indices]


def encoded_data(
    train: Source, train_labels: Tensor, test: Source, test_labels: Tensor, num_classes: int, name: str
) -> Data:
    """The data set of two sources of encoded images; its first training image decides on the size.

    Small images are shifted by up to an eighth of their height, large ones cropped at random. Images are mirrored if
    the first one has colour: what is grey is often writing, which mirroring spoils.
    """
    with _opened(*train.read(0)) as first:
        width, height = _upright_size(first)
        coloured = first.mode not in ("1", "L", "LA") and not first.mode.startswith("I")
    small = max(width, height) <= SMALL
    size = (height, width) if small else (LARGE, LARGE)
    augmentation = Augmentation(padding=height // 8 if small else 0, flip=coloured)
    sets = [
        EncodedImages(source, labels, size, not small, augmentation)
        for source, labels in ((train, train_labels), (test, test_labels))
    ]
    if small and sum(map(len, sets)) * 3 * height * width <= MEMORY:
        arrays = [images.pixels(torch.arange(len(images))).contiguous() for images in sets]
        normalisation = Normalisation.of(arrays[0])
        sets = [
            ArrayImages(array, images.labels, normalisation, augmentation)
            for array, images in zip(arrays, sets, strict=True)
        ]
    return Data(sets[0], sets[1], num_classes, (3, *size), name)
