"""The weighted k-th value of numbers that may be spread over processes: a radix selection, eight bits at a time."""

import torch
from torch import Tensor

from str_triton.budget.processes import Processes

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
DIGIT = 8  # Bits. A pass sends 2 ** DIGIT sums of 8 bytes.
_BINS = 1 << DIGIT


def cut_value(values: Tensor, costs: Tensor | int, budget: int, processes: Processes) -> float | None:
    """Return the value at which a budget ends: larger ones cost at most `budget`, together with equal ones more.

    Args:
        values: this process's values [n], float32 or float64, without NaN.
        costs: cost of each value, whole numbers >= 0; int64 [n], or one for all.
        budget: >= 0.
        processes: the processes that hold the values together.

    Returns:
        The value; None if all values together cost no more than the budget.
    """
    keys = _keys(values)
    costs = torch.as_tensor(costs, device=keys.device).expand(keys.shape)
    bits = keys.dtype.itemsize * 8
    cut = -(1 << (bits - 1))  # The signed key whose digits, counted from the smallest one, are all 0.
    for shift in range(bits - DIGIT, -1, -DIGIT):
        digits = ((keys >> shift) & (_BINS - 1)).to(torch.int64)
        if shift == bits - DIGIT:
            digits ^= _BINS // 2  # The first bit is the sign.
        spent = torch.zeros(_BINS, dtype=torch.int64, device=keys.device).scatter_add_(0, digits, costs)
        spent = processes.sum(spent)
        above = spent.sum() - spent.cumsum(0)
        if shift == bits - DIGIT and int(spent.sum()) <= budget:
            return None
        digit = int((above > budget).sum())
        budget -= int(above[digit])
        cut += digit << shift
        inside = digits == digit
        keys, costs = keys[inside], costs[inside]
    return float(_exchanged(torch.tensor([cut], dtype=keys.dtype)).view(values.dtype))


def _keys(values: Tensor) -> Tensor:
    """Return integers in the same order as the values; -0.0 is 0.0."""
    return _exchanged((values + 0.0).view(INTEGERS[values.dtype.itemsize]))


def _exchanged(bits: Tensor) -> Tensor:
    """Invert the bits below the sign of negative numbers: a float's bits become an ordered integer, and back."""
    return bits ^ ((bits >> (bits.dtype.itemsize * 8 - 1)) & torch.iinfo(bits.dtype).max)
