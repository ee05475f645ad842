"""Weights as the C program holds them: float32, or int8 with scales."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from str_triton import LowRankWeight

LARGEST = 127  # of an int8 weight; -128 is not used


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [outputs, columns], dense or in factors, each float32 or int8.

    Attributes:
        rows: dense the matrix itself; in factors u [outputs, rank].
        inner: v^T [rank, columns]; None: dense.
        scale: of int8 weights, float32. Dense [1]: W_ij = scale rows_ij. In factors [rank], of each component the
            product of what its two vectors were divided by: W_ij = sum_k rows_ik scale_k inner_kj. None: the weights
            are float32.
    """

    rows: np.ndarray
    inner: np.ndarray | None
    scale: np.ndarray | None

    @classmethod
    def of(cls, weight: LowRankWeight | Tensor, *, int8: bool) -> "StoredMatrix":
        """A compact matrix, in factors where it is.

        In int8 a dense matrix, or each vector of a component, is divided by its largest magnitude / 127 and rounded: a
        weight of it moves by at most 1 / 254 of that magnitude.
        """
        if not isinstance(weight, LowRankWeight):
            dense = as_float32(weight)
            if not int8:
                return cls(dense, None, None)
            rows, scale = quantized(dense.reshape(1, -1))
            return cls(rows.reshape(dense.shape), None, scale)
        u, v = as_float32(weight.u * weight.spectrum()), as_float32(weight.v)
        if not int8:
            return cls(u, v.T, None)
        (columns_u, scale_u), (columns_v, scale_v) = quantized(u.T), quantized(v.T)
        return cls(columns_u.T, columns_v, scale_u * scale_v)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and columns."""
        return len(self.rows), (self.rows if self.inner is None else self.inner).shape[1]

    @property
    def rank(self) -> int:
        """Of the factors; 0: dense."""
        return 0 if self.inner is None else len(self.inner)

    def weight(self) -> np.ndarray:
        """The matrix that the program computes with, float64 [outputs, columns]."""
        rows = self.rows.astype(np.float64)
        if self.inner is None:
            return rows if self.scale is None else rows * self.scale
        return (rows if self.scale is None else rows * self.scale) @ self.inner.astype(np.float64)


@dataclass(frozen=True)
class StoredVector:
    """A bias: values float32, or int8 times scale."""

    values: np.ndarray
    scale: float | None

    @classmethod
    def of(cls, values: np.ndarray, *, int8: bool) -> "StoredVector":
        """float32 [n], rounded as a dense matrix is."""
        if not int8:
            return cls(values, None)
        (whole,), (scale,) = quantized(values[None])
        return cls(whole, float(scale))


def as_float32(values: Tensor) -> np.ndarray:
    """Weights as float32 on the CPU; ValueError where one is NaN or infinite."""
    values = values.detach().to("cpu", torch.float32)
    if not bool(values.isfinite().all()):
        raise ValueError("the network has weights that are NaN or infinite")
    return values.contiguous().numpy()


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, size] and float32 [n], whose product by row is about `rows`; a row of zeros has the scale 1."""
    scale = np.abs(rows).max(axis=1) / LARGEST
    scale[scale == 0] = 1
    return np.round(rows / scale[:, None]).astype(np.int8), scale.astype(np.float32)
