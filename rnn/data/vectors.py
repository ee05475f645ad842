"""Sequences of vectors held in memory: standardised, padded a batch at a time, and noise on them for training."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standardisation:
    """(x - mean) / std by feature; `mean` and `std` float32 [F]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor, lengths: Tensor | None) -> "Standardisation":
        """The statistics over all steps of features [N, T, F], those at or beyond `lengths` (int64 [N]) left out.

        They are summed in float64. A feature that never changes keeps its unit: its deviation counts as 1.
        """
        steps = features.flatten(0, 1) if lengths is None else features[_unpadded(lengths, features.shape[1])]
        std, mean = torch.std_mean(steps.double(), dim=0, correction=0)
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def __call__(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """[N, T, F] -> the same, float32; zeros at the padded steps."""
        standardised = (features - self.mean) / self.std
        if lengths is not None:
            standardised.masked_fill_(~_unpadded(lengths, features.shape[1])[:, :, None], 0)
        return standardised


@dataclass(frozen=True, eq=False)
class VectorExamples:
    """Sequences in memory. See `common.Examples`.

    features: float32 [N, T, F], standardised, zeros at the padded steps; on any device. labels: int64 [N] on the CPU.
    lengths: int64 [N] on the CPU, or None where all sequences have T steps. noise: with `augment` every number of every
    unpadded step gets a normal one of that standard deviation added, fresh for each batch.
    """

    features: Tensor
    labels: Tensor
    lengths: Tensor | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def __len__(self) -> int:
        return len(self.labels)

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
    """Raises ValueError unless `noise` can be a standard deviation."""
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise {noise}: a standard deviation is a number >= 0")


def check_finite(features: Tensor, file: object, names: tuple[str, ...] | None = None) -> None:
    """Raise ValueError, naming `file`, the row from 1 and the column, if features [rows, columns] hold NaN or inf.

    So do numbers that are infinite in float32. names: what the columns are called; without them they are numbered
    from 1.
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
    """bool [N, steps]: the steps that belong to each sequence."""
    return torch.arange(steps) < lengths[:, None]
