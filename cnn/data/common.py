"""What every data set is here: two sets of images, and what a model has to know of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

OnCorrupt = Callable[[str], None] | None
"""What is told of each corrupt image, in a line that names it, and then goes on; None ends with that line instead."""


class Images(Protocol):
    """A map-style set of labelled images, read a batch at a time."""

    in_memory: bool
    """Whether `batch` only looks up: worker processes would cost more than they give."""
    normalisation: Callable[[Tensor], Tensor]
    """What makes of a batch's pixels, on any device, float32 [B, C, H, W] of about zero mean and unit variance."""

    def __len__(self) -> int: ...

    def batch(
        self, indices: Tensor, *, seed: int, epoch: int, augment: bool, on_corrupt: OnCorrupt = None
    ) -> tuple[Tensor, Tensor]:
        """The images and labels of `indices` (int64 [B]).

        Returns uint8 [B, C, H, W], not yet normalised, and int64 [B]. An image's bits depend on (seed, epoch, its
        index) alone, not on the others in the batch; without `augment` on its index alone.

        Raises ValueError, naming the image, when one cannot be decoded. With `on_corrupt` that is told instead, and the
        next image that can be decoded stands in for it, label and all; without `augment`, which is to say in testing,
        where no image should count twice, it is left out.
        """
        ...


@dataclass(frozen=True)
class Data:
    """A data set: `train` and `test` images of `image_shape` = (C, H, W), with labels 0 ... num_classes - 1.

    `left_out` holds a line about each corrupt image that is already left out of `test`.
    """

    train: Images
    test: Images
    num_classes: int
    image_shape: tuple[int, int, int]
    name: str
    left_out: tuple[str, ...] = ()


TEST_SHARE = 0.2


def stratified_split(labels: Tensor, keys: Tensor, class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Hold out a fifth of each class: the images with its lowest `keys`.

    labels: int64 [N]; keys: int64 [N], random-looking and belonging to the image, so that the split is always the same.
    Returns the indices of the training and of the test images, each in ascending order. Raises ValueError for a class
    with a single image.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(class_names):
        members = torch.nonzero(labels == label)[:, 0]
        if len(members) == 1:
            raise ValueError(f"class {name!r} has one image: holding out a test set takes at least two per class")
        count = max(1, round(TEST_SHARE * len(members)))
        held_out[members[torch.argsort(keys[members], stable=True)[:count]]] = True
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]
