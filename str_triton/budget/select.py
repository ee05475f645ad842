"""The exact weighted k-th value of many tensors at once, without host synchronization: a radix selection.

Four histograms of eight bits each. Costs are integers, so the order of addition changes no bit of the sums or of the
result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from str_triton.ops.radix_select import keys, value_of


def select(values: Sequence[Tensor], costs: Sequence[int], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cut above which the elements cost at most `keep` together, and as much as possible.

    Args:
        values: float32 tensors of any shapes on one device, without NaN; inf for an element that is kept at any cost.
        costs: for each tensor the cost of one element, a whole number >= 0.
        keep: int64 scalar tensor on the same device, >= 0.

    Returns:
        (below, above), float32 scalar tensors. Elements up to `below` are cut, elements from `above` on are kept, and
        none lies between. Equal elements are cut together. `below` is -inf if nothing is cut, and `above` is inf if no
        finite element is kept.
    """
    values = [value.contiguous() for value in values]
    everything = sum(value.numel() * cost for value, cost in zip(values, costs, strict=True))
    key = torch.zeros_like(keep)
    for shift in (24, 16, 8, 0):
        costs_of_digits = torch.ops.str_triton.radix_select_histogram(values, list(costs), key, shift)
        if shift == 24:  # The histograms leave out inf.
            keep = (keep - (everything - costs_of_digits.sum())).clamp(min=0)
        costs_above = costs_of_digits.sum() - costs_of_digits.cumsum(0)
        digit = (costs_above > keep).sum()
        keep = keep - costs_above.gather(0, digit.reshape(1)).squeeze(0)
        key = (key << 8) + digit
    below = value_of(torch.maximum(key, keys(torch.full((), -torch.inf, device=key.device))))
    return below, torch.ops.str_triton.radix_select_least(values, below)
