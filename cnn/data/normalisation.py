"""Normalisation of pixels by colour channel."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


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
