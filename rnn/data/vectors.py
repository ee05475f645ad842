"""Sequences of vectors in memory: standardisation, padding of batches, and noise for training."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standardisation:
    """The map x -> (x - mean) / std of each feature; `mean` and `std` are float32 [F]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor, lengths: Tensor | None) -> "Standardisation":
        """Compute the statistics of features [N, T, F] over all steps, without the padding beyond `lengths`, int64 [N].

        Sums are float64. A constant feature gets the deviation 1.
        """
        steps = features.flatten(0, 1) if lengths is None else features[_unpadded(lengths, features.shape[1])]
        std, mean = torch.std_mean(steps.double(), dim=0, correction=0)
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def __call__(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """Return standardised features, float32 [N, T, F], with zeros at the padded steps."""
        standardised = (features - self.mean) / self.std
        if lengths is not None:
            standardised.masked_fill_(~_unpadded(lengths, features.shape[1])[:, :, None], 0)
        return standardised


@dataclass(frozen=True, eq=False)
class VectorExamples:
    """Sequences in memory. See `common.Examples`.

    features: float32 [N, T, F], standardised, zeros at the padded steps; on any device. labels: int64 [N] on the CPU.
    lengths: int64 [N] on the CPU, or None where all sequences have T steps. noise: standard deviation of the normal
    noise that `augment` adds to the unpadded steps. Each batch draws new noise. raw: the features on the CPU before
    they were standardised; None where nobody needs `stored`.
    """

    features: Tensor
    labels: Tensor
    lengths: Tensor | None = None
    noise: float = 0.0
    raw: Tensor | None = None

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, index: int) -> bytes | None:
        return None if self.raw is None else self.raw[index].numpy().tobytes()

    def batch(
        self, indices: Tensor, *, augment: bool, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        lengths, x = None, self.features[indices.to(self.features.device)]
        if self.lengths is not None:
            lengths = self.lengths[indices]
            x = x[:, : int(lengths.max()) if len(lengths) else 0]
        if augment and self.noise:
            drawn = torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
            if lengths is not None:
                drawn.masked_fill_(~_unpadded(lengths, x.shape[1]).to(x.device)[:, :, None], 0)
            x = x + self.noise * drawn
        return x.to(device).contiguous(), lengths, self.labels[indices].to(device)


def check_noise(noise: float) -> None:
    """Raise ValueError unless `noise` is a valid standard deviation."""
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise {noise}: a standard deviation is a number >= 0")


def check_finite(features: Tensor, file: object, names: tuple[str, ...] | None = None) -> None:
    """Raise ValueError if features [rows, columns] hold NaN, infinity or a number that float32 cannot hold.

    The message names `file`, the row (counted from 1) and the column. names: the columns' names; by default the columns
    are numbered from 1.
    """
    finite = features.float().isfinite()
    if bool(finite.all()):
        return
    row, column = torch.nonzero(~finite)[0].tolist()
    value = features[row, column]
    found = "NaN" if bool(value.isnan()) else "an infinite number"
    if bool(value.isfinite()):
        found = f"{value.item():g}, too large for float32,"
    where = names[column] if names else f"column {column + 1}"
    raise ValueError(f"{file}: {found} in {where}, row {row + 1}")


def _unpadded(lengths: Tensor, steps: int) -> Tensor:
    """Return the mask of the steps that are not padding, bool [N, steps]."""
    return torch.arange(steps) < lengths[:, None]
