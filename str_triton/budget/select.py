"""The exact weighted k-th value of many tensors at once, without host synchronization: a radix selection.

Two histogram passes of 16 bits each. Costs are integers, so that the sums, and with them the result, are the same bits
in whatever order they are added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_BINS = 1 << 16


def select(values: Sequence[Tensor], costs: Sequence[int], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where to cut so that the elements above the cut cost at most `keep` together, and as much as possible.

    Args:
        values: float32 tensors of any shapes on one device, without NaN; inf for what is always kept.
        costs: for each tensor what one of its elements costs, a whole number >= 0.
        keep: int64 scalar tensor on the same device.

    Returns:
        (below, above), float32 scalar tensors. Elements up to `below` are cut, elements from `above` on are kept, and
        none lies between. Equal elements are cut together. -inf for `below` where nothing need be cut.
    """
    keys = [_ordered(value) for value in values]
    above_high = _cost_above([(key >> 16) + _BINS // 2 for key in keys], costs)
    high = (above_high > keep).sum()
    left = keep - above_high.gather(0, high.reshape(1)).squeeze(0)
    # Elements of other bins go to the lowest, which lies above none.
    low_keys = [torch.where((key >> 16) + _BINS // 2 == high, key & 0xFFFF, 0) for key in keys]
    low = (_cost_above(low_keys, costs) > left).sum()
    cut = (((high - _BINS // 2) << 16) + low).to(torch.int32)
    infinity = _ordered(torch.full((), torch.inf, device=cut.device))
    cut = torch.maximum(cut, _ordered(torch.full((), -torch.inf, device=cut.device)))
    above = torch.stack([torch.where(key > cut, key, infinity).amin() for key in keys if key.numel()]).amin()
    return _value(cut), _value(above)


def _ordered(values: Tensor) -> Tensor:
    """float32 as int32 with the same order: the bits, with those of negative numbers below the sign inverted."""
    bits = values.contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: Tensor) -> Tensor:
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _cost_above(bins: list[Tensor], costs: Sequence[int]) -> Tensor:
    """For each bin what the elements of the bins above it cost together; int64 [bins]."""
    total = torch.zeros(_BINS, dtype=torch.int64, device=bins[0].device)
    for index, cost in zip(bins, costs, strict=True):
        index = index.flatten().to(torch.int64)
        total.scatter_add_(0, index, torch.full((), cost, device=index.device).expand_as(index))
    return total.sum() - total.cumsum(0)
