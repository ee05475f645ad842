"""Images held in memory as uint8, and the augmentation of small images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from str_triton.cnn.data.common import Images, OnCorrupt
from str_triton.cnn.data.counter_random import uniforms
from str_triton.cnn.data.normalisation import Normalisation
from str_triton.training.fingerprint import Fingerprint


@dataclass(frozen=True)
class Augmentation:
    """Random shifts by up to `padding` pixels each way, filled with black. `flip` also mirrors half the images."""

    padding: int = 0
    flip: bool = False

    DRAWS = 3

    def mirrors(self, draws: Sequence[float]) -> bool:
        """Return whether an image with these draws is mirrored."""
        return self.flip and draws[2] < 0.5

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment images, uint8 [B, C, H, W], by `draws`, random numbers [>= DRAWS, B] in [0, 1)."""
        if not (self.padding or self.flip):
            return images
        count, channels, height, width = images.shape
        top, left = (draws[:2] * (2 * self.padding + 1)).long()
        rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
        if self.flip:
            columns = torch.where((draws[2] < 0.5)[:, None], columns.flip(1), columns)
        padded = F.pad(images, [self.padding] * 4)
        # One gather in flat memory is several times faster than indexing windows of the padded images.
        planes = torch.arange(count * channels).view(count, channels, 1, 1) * (padded.shape[2] * padded.shape[3])
        places = planes + (rows * padded.shape[3])[:, None, :, None] + columns[:, None, None, :]
        return padded.reshape(-1).gather(0, places.view(-1)).view(images.shape)


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory: `images` uint8 [N, C, H, W], `labels` int64 [N]. See `common.Images`.

    `encoded` are the images that these were decoded from, if any.
    """

    images: Tensor
    labels: Tensor
    normalisation: Normalisation
    augmentation: Augmentation
    encoded: Images | None = None

    in_memory = True

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> Fingerprint:
        if self.encoded is not None:
            return self.encoded.fingerprint()
        return Fingerprint.of(self.labels, lambda index: self.images[index].numpy().tobytes())

    def batch(
        self, indices: Tensor, *, seed: int, epoch: int, augment: bool, on_corrupt: OnCorrupt = None
    ) -> tuple[Tensor, Tensor]:
        images = self.images.index_select(0, indices)  # twenty times as fast as images[indices]
        if augment:
            images = self.augmentation(images, uniforms(seed, epoch, indices, Augmentation.DRAWS))
        return images, self.labels[indices]
