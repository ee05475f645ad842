"""The interface of all data sets: training and test images, and the figures that a model needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from str_triton.cnn.data.normalisation import Normalisation
from str_triton.training.fingerprint import Fingerprint
from str_triton.training.interface import ImageInput, Interface

OnCorrupt = Callable[[str], None] | None
"""A function that gets a line about each corrupt image, which is then skipped; None: a corrupt image is an error."""


class Images(Protocol):
    """A map-style set of labelled images, read a batch at a time."""

    in_memory: bool
    """True if `batch` only copies from memory, so that worker processes would make it slower."""

    @property
    def normalisation(self) -> Normalisation:
        """Return the map from a batch's pixels, on any device, to float32 [B, C, H, W] of mean 0 and variance 1."""
        ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the stored images and their labels. A few images are decoded."""
        ...

    def batch(
        self, indices: Tensor, *, seed: int, epoch: int, augment: bool, on_corrupt: OnCorrupt = None
    ) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 [B, C, H, W], not yet normalised, and labels, int64 [B], of `indices`, int64 [B].

        The bits of an image depend only on (seed, epoch, its index), without `augment` only on its index. They do not
        depend on the other images in the batch.

        Raises ValueError, which names the image, when one cannot be decoded and `on_corrupt` is None. Otherwise
        `on_corrupt` is called. With `augment` (in training) the next image that can be decoded then takes its place,
        with that image's label. Without `augment` (in testing) the image is left out, so that no image counts twice.
        """
        ...


@dataclass(frozen=True)
class Data:
    """A data set: `train` and `test` images of `image_shape` = (C, H, W); label k stands for `class_names[k]`.

    Attributes:
        crop: the central square that `test` takes of each image, as a share of the image's shorter side; None if it
            takes the whole image.
        left_out: a line about each corrupt image that was left out of `test` on loading.
    """

    train: Images
    test: Images
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    name: str
    crop: float | None = None
    left_out: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    def interface(self) -> Interface:
        """Return what a stranger needs to feed a network that was trained on these data, and to read its scores."""
        normalisation = self.test.normalisation
        images = ImageInput(*self.image_shape, self.crop)
        return Interface(self.class_names, (normalisation.mean, normalisation.std), images)


@dataclass(frozen=True)
class NetworkInput:
    """How a trained network takes images: their channels, size and crop, and their normalisation."""

    images: ImageInput
    normalisation: Normalisation

    @classmethod
    def of(cls, interface: Interface | None) -> "NetworkInput | None":
        """Return what `interface` says of images; None if it lacks a part of it."""
        if interface is None or interface.images is None or interface.standardisation is None:
            return None
        return cls(interface.images, Normalisation(*interface.standardisation))


TEST_SHARE = 0.2


def stratified_split(labels: Tensor, keys: Tensor, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Split each class 80/20 and return the indices of the training and of the test images, both in ascending order.

    The test set gets the images of each class with the lowest keys.

    Args:
        labels: int64 [N].
        keys: int64 [N], pseudorandom and a function of the image, so that the split is always the same.

    Raises:
        ValueError: a class has a single image.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(class_names):
        members = torch.nonzero(labels == label)[:, 0]
        if len(members) == 1:
            raise ValueError(f"class {name!r} has one image: a test set can be held out of two or more per class")
        count = max(1, round(TEST_SHARE * len(members)))
        held_out[members[torch.argsort(keys[members], stable=True)[:count]]] = True
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]
