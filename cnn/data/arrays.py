"""Images held in memory as uint8, and the augmentation of small images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from str_triton.cnn.data.common import OnCorrupt
from str_triton.cnn.data.counter_random import uniforms


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


@dataclass(frozen=True)
class Normalisation:
    """Normalisation by channel, (x - mean) / std. `mean` and `std` are in pixel values, 0 ... 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> "Normalisation":
        """Compute the exact statistics of images, uint8 [N, C, H, W], by counting each pixel value."""
        values = torch.arange(256, dtype=torch.float64)
        mean, std = [], []
        for channel in range(images.shape[1]):
            counts = torch.zeros(256, dtype=torch.int64)
            for part in images[:, channel].split(4096):  # bincount widens its input to 8 bytes a pixel
                counts += torch.bincount(part.reshape(-1), minlength=256)
            share = counts / counts.sum().double()
            mean.append(float(share @ values))
            std.append(float(share @ (values - mean[-1]) ** 2) ** 0.5 or 1.0)
        return cls(tuple(mean), tuple(std))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images, uint8 [B, C, H, W], to float32, contiguous, on the same device."""
        mean = _by_channel(self.mean, images.device)
        scale = _by_channel(tuple(1 / std for std in self.std), images.device)
        return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).mul_(scale)


@cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `values` as float32 [C, 1, 1]. They are cached, because a copy to the device would synchronize."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory: `images` uint8 [N, C, H, W], `labels` int64 [N]. See `common.Images`."""

    images: Tensor
    labels: Tensor
    normalisation: Normalisation
    augmentation: Augmentation

    in_memory = True

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, indices: Tensor, *, seed: int, epoch: int, augment: bool, on_corrupt: OnCorrupt = None
    ) -> tuple[Tensor, Tensor]:
        images = self.images.index_select(0, indices)  # twenty times as fast as images[indices]
        if augment:
            images = self.augmentation(images, uniforms(seed, epoch, indices, Augmentation.DRAWS))
        return images, self.labels[indices]
