"""The two passes of a radix selection over many float32 tensors (budget/select.py): kernels/radix_select.py.

Values are ordered by 32-bit keys. A histogram counts eight bits of a key, the digit at `shift`, of the elements whose
higher bits equal a prefix. Costs are integers, so the order in which they are added does not change the sums. Nothing
waits for a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from str_triton.ops.layout import _starts
from str_triton.ops.registration import op
from str_triton.ops.soft_threshold_many import tables

BINS = 256
SPAN, BLOCK = 1 << 14, 1 << 11  # Elements per program, and at a time.
SIGN = 1 << 31


def keys(values: Tensor) -> Tensor:
    """Return the keys of float32 values as int64, 0 to 2^32 - 1. Both zeros have one key."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits, bits + SIGN)


def value_of(key: Tensor) -> Tensor:
    """Return the float32 value of a key."""
    return torch.where(key < SIGN, ~key, key - SIGN).to(torch.int32).view(torch.float32)


def _histogram(values: list[Tensor], costs: list[int], prefix: Tensor, shift: int) -> Tensor:
    """Return, for each digit, the total cost of the elements whose key is prefix | digit | anything: int64 [256].

    Elements of inf and NaN do not count. Others cost a whole number from 0 to 2^56. `shift` is the number of bits below
    the digit.
    """
    total = torch.zeros(BINS, dtype=torch.int64)
    for value, cost in zip(values, costs, strict=True):
        key = keys(value[value < torch.inf])
        key = key[key >> (shift + 8) == prefix]
        total += cost * torch.bincount((key >> shift) & (BINS - 1), minlength=BINS)
    return total


def _least(values: list[Tensor], cut: Tensor) -> Tensor:
    """Return the least value above `cut`, inf if there is none."""
    above = torch.cat([value.flatten() for value in values])
    return torch.where(above > cut, above, torch.inf).amin() if len(above) else cut.new_full((), torch.inf)


def _histogram_triton(values: list[Tensor], costs: list[int], prefix: Tensor, shift: int) -> Tensor:
    from str_triton.kernels.radix_select import radix_select_histogram_kernel as kernel

    return _partials(kernel, values, costs, prefix, BINS, SHIFT=shift).sum(0)


def _least_triton(values: list[Tensor], cut: Tensor) -> Tensor:
    from str_triton.kernels.radix_select import radix_select_least_kernel as kernel

    partials = _partials(kernel, values, [0] * len(values), cut, 1)
    return partials.amin() if len(partials) else cut.new_full((), torch.inf)


def _partials(kernel: Any, values: list[Tensor], costs: list[int], given: Tensor, width: int, **options: int) -> Tensor:
    """Launch a kernel over all values, and return the row that each program has written: [programs, width]."""
    programs = [-(-value.numel() // SPAN) for value in values]
    rows = zip([value.numel() for value in values], costs, _starts(programs)[0], [0] * len(values), strict=True)
    addresses, layout, owners, _, aligned = tables(values, rows, sum(programs), 0)
    partials, options = given.new_empty((len(owners), width)), options | {"SPAN": SPAN, "BLOCK": BLOCK}
    if len(owners):
        with torch.cuda.device_of(given):
            arguments = owners, layout, addresses, values[0], given, partials
            kernel[(len(owners),)](*arguments, **options, ALIGNED=aligned)
    return partials


@op(
    "radix_select_histogram(Tensor[] values, int[] costs, Tensor prefix, int shift) -> Tensor",
    _histogram,
    _histogram_triton,
)
def _(values, costs, prefix, shift):
    return prefix.new_empty(BINS)


@op("radix_select_least(Tensor[] values, Tensor cut) -> Tensor", _least, _least_triton)
def _(values, cut):
    return torch.empty_like(cut)
