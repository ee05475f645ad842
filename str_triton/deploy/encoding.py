"""Encoding of a tensor for a packed file: its nonzero values and their positions, or all values.

An element is a zero if all its bits are, so every value is restored bit for bit: -0.0, NaN and infinities of any dtype.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from str_triton.deploy import positions
from str_triton.deploy.content import DTYPES, Stored, elements, part_names
from str_triton.deploy.packed_file import Part

NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_NBYTES = 128  # about the bytes that a second array adds to the header


def encode(name: str, tensor: Tensor, *, plain_zeros: bool = False) -> tuple[dict[str, Part], dict[str, Any]]:
    """Return the parts to store of a tensor, and the other fields that `decode` needs.

    With ``plain_zeros``, -0.0 is stored as 0.0. Raises ValueError for a dtype that safetensors lacks.
    """
    if tensor.dtype not in NAMES:
        known = ", ".join(map(dtype_name, NAMES))
        raise ValueError(f"tensor {name!r} is {dtype_name(tensor.dtype)}; the dtypes that can be packed are {known}")
    dtype, shape = NAMES[tensor.dtype], tuple(tensor.shape)
    bits = _bits(tensor)
    is_negative_zero = np.zeros(0, bool)
    if tensor.is_floating_point():
        is_negative_zero = bits == _sign(bits)
        if plain_zeros:
            bits = np.where(is_negative_zero, bits.dtype.type(0), bits)
    is_nonzero = bits != 0
    negative_zeros = 0 if plain_zeros else int(is_negative_zero.sum())
    entry = {"shape": shape, "nonzeros": int(is_nonzero.sum()) - negative_zeros}
    candidates: list[tuple[NDArray[np.bool_], NDArray[np.uint8] | None]] = [(is_nonzero, None)]
    if negative_zeros:
        is_value = is_nonzero & ~is_negative_zero
        candidates.append((is_value, np.packbits(is_negative_zero[~is_value], bitorder="little")))
    best, best_size = None, bits.nbytes - HEADER_NBYTES
    for is_stored, signs in candidates:
        signs_size = 0 if signs is None else signs.size
        if int(is_stored.sum()) * bits.itemsize + signs_size >= best_size:
            continue
        low_bits, where = positions.encode(np.flatnonzero(is_stored))
        chosen = [(dtype, bits[is_stored]), ("U8", where), *([] if signs is None else [("U8", signs)])]
        if (total := sum(data.nbytes for _, data in chosen)) < best_size:
            best, best_size = (low_bits, chosen), total
    if best is None:
        return {name: Part(dtype, shape, bits.view(np.uint8))}, entry
    low_bits, chosen = best
    parts = {
        key: Part(kind, (data.size,), data.view(np.uint8))
        for key, (kind, data) in zip(part_names(name), chosen, strict=False)  # signs may be absent
    }
    return parts, entry | {"low_bits": low_bits}


def decode(name: str, entry: Stored, parts: Mapping[str, Part]) -> Tensor:
    """Return the tensor that `encode` has encoded, in the dtype of its stored values.

    Raises ValueError, which names the tensor, if its positions or truth values are invalid.
    """
    if entry.low_bits is None:
        dtype, flat = parts[name].dtype, parts[name].data.copy()
    else:
        values_name, where_name, signs_name = part_names(name)
        values, where, signs = parts[values_name], parts[where_name], parts.get(signs_name)
        dtype = values.dtype
        bits = np.zeros(elements(name, entry.shape), f"u{DTYPES[dtype].itemsize}")
        try:
            index = positions.decode(entry.low_bits, values.shape[0], where.data, bits.size)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from None
        bits[index] = values.data.view(bits.dtype)
        if signs is not None:
            is_zero = np.ones(bits.size, bool)
            is_zero[index] = False
            zeros = np.flatnonzero(is_zero)
            is_negative = np.unpackbits(signs.data, count=zeros.size, bitorder="little").view(bool)
            bits[zeros[is_negative]] = _sign(bits)
        flat = bits.view(np.uint8)
    if dtype == "BOOL" and flat.size and flat.max() > 1:
        raise ValueError(f"tensor {name!r}: a byte of {flat.max()} is neither true nor false")
    if not flat.size:  # torch cannot view an empty tensor as another dtype
        return torch.empty(entry.shape, dtype=DTYPES[dtype])
    return torch.from_numpy(flat).view(DTYPES[dtype]).reshape(entry.shape)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to `dtype` if it has two or more dimensions and a wider floating-point dtype.

    Returns other tensors unchanged. Raises ValueError if a finite value is too large for `dtype`.
    """
    if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.itemsize <= dtype.itemsize:
        return tensor
    narrow = tensor.to(dtype)
    if (too_large := narrow.isinf() & tensor.isfinite()).any():
        value, limit = float(tensor[too_large][0]), torch.finfo(dtype).max
        raise ValueError(
            f"tensor {name!r} holds {value:g}, and {dtype_name(dtype)} ends at {limit:g}: choose other values"
        )
    return narrow


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> NDArray[np.unsignedinteger]:
    """Return the elements [numel], row by row, as unsigned integers of the same size."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _sign(bits: NDArray[np.unsignedinteger]) -> np.unsignedinteger:
    """Return the bits of -0.0 in this size."""
    return bits.dtype.type(1 << 8 * bits.itemsize - 1)
