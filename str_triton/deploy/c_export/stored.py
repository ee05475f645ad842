"""Weights in the form in which the C program stores them: float32, or int8 with scales."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from str_triton.nn.low_rank import LowRankWeight

LARGEST = 127  # the largest int8 weight; -128 is not used


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix W [outputs, columns], dense or in factors, in float32 or int8.

    Attributes:
        rows: the matrix itself, or the factor u [outputs, rank].
        inner: the factor v^T [rank, columns]; None for a dense matrix.
        scale: the scales of int8 weights, float32; None for float32 weights. A dense matrix has one scale:
            W_ij = scale rows_ij. A matrix in factors has one for each component, the product of the scales of its two
            vectors: W_ij = sum_k rows_ik scale_k inner_kj.
    """

    rows: np.ndarray
    inner: np.ndarray | None
    scale: np.ndarray | None

    @classmethod
    def of(cls, weight: LowRankWeight | Tensor, *, int8: bool) -> "StoredMatrix":
        """Store a compact matrix. A matrix in factors stays in factors.

        int8 divides a dense matrix, or each vector of a component, by its scale (its largest magnitude / 127) and
        rounds. A weight changes by at most 1 / 254 of that magnitude.
        """
        if not isinstance(weight, LowRankWeight):
            dense = as_float32(weight)
            if not int8:
                return cls(dense, None, None)
            rows, scale = quantize(dense.reshape(1, -1))
            return cls(rows.reshape(dense.shape), None, scale)
        u, v = as_float32(weight.u * weight.spectrum()), as_float32(weight.v)
        if not int8:
            return cls(u, v.T, None)
        (columns_u, scale_u), (columns_v, scale_v) = quantize(u.T), quantize(v.T)
        return cls(columns_u.T, columns_v, scale_u * scale_v)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of outputs and columns."""
        return len(self.rows), (self.rows if self.inner is None else self.inner).shape[1]

    @property
    def rank(self) -> int:
        """Return the rank of the factors, 0 for a dense matrix."""
        return 0 if self.inner is None else len(self.inner)

    def weight(self) -> np.ndarray:
        """Return the matrix that the C program computes with, float64 [outputs, columns]."""
        rows = self.rows.astype(np.float64)
        if self.inner is None:
            return rows if self.scale is None else rows * self.scale
        return (rows if self.scale is None else rows * self.scale) @ self.inner.astype(np.float64)


@dataclass(frozen=True)
class StoredVector:
    """A bias: float32 values, or int8 values times `scale`."""

    values: np.ndarray
    scale: float | None

    @classmethod
    def of(cls, values: np.ndarray, *, int8: bool) -> "StoredVector":
        """Store float32 [n]. int8 rounds it as it rounds a dense matrix."""
        if not int8:
            return cls(values, None)
        (rounded,), (scale,) = quantize(values[None])
        return cls(rounded, float(scale))


def as_float32(values: Tensor) -> np.ndarray:
    """Return weights as a float32 array; raise ValueError for NaN and infinite values."""
    values = values.detach().to("cpu", torch.float32)
    if not bool(values.isfinite().all()):
        raise ValueError("the network has weights that are NaN or infinite")
    return values.contiguous().numpy()


def quantize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each row to int8 [n, size] times a scale, float32 [n]. A row of zeros has the scale 1."""
    scale = np.abs(rows).max(axis=1) / LARGEST
    scale[scale == 0] = 1
    return np.round(rows / scale[:, None]).astype(np.int8), scale.astype(np.float32)
