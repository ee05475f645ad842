"""Makes a thresholded weight keep an exact number of elements, also where its threshold cannot tell elements apart."""

import torch
from torch import Tensor

from str_triton.nn import ThresholdedWeight

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def keep_exactly(weight: ThresholdedWeight, count: int) -> tuple[Tensor, Tensor] | None:
    """Move elements of the dense weight across the threshold, as few as possible, until `count` elements survive.

    Elements that survive and are too many, the smallest first and among equal ones the last ones, get the magnitude of
    the threshold, rounded down, so that they are pruned. Where too few survive, the largest of the others, among equal
    ones the first ones, get the next larger magnitude that survives. Elements of 0 stay.

    Returns:
        The places that changed, int64 [n] into the flattened weight, and what stood there, [n]; None if nothing did.
    """
    survivors = weight.sparse.flatten() != 0
    excess = int(survivors.sum()) - count
    if excess == 0:
        return None
    dense = weight.dense.detach()
    flat = dense.flatten()
    places = (survivors if excess > 0 else ~survivors & (flat != 0)).nonzero().squeeze(1)
    if excess < 0 and len(places) == 0:
        return None
    places = _extreme(places, weight.pruning_offsets().flatten()[places], excess)
    old = flat[places]
    threshold = weight.holder.threshold.detach()
    threshold = threshold.expand(dense.shape).flatten()[places] if threshold.numel() > 1 else threshold.reshape(1)
    limit = _rounded_down(threshold, old)
    new = limit if excess > 0 else _surviving(limit, threshold)
    put(dense, places, torch.copysign(new.expand_as(old), old))
    return places, old


@torch.no_grad()
def put(dense: Tensor, places: Tensor, values: Tensor) -> None:
    """Write values [n] to places [n] of the flattened tensor, in place, whatever its memory format."""
    dense[torch.unravel_index(places, dense.shape)] = values


def _extreme(places: Tensor, offsets: Tensor, excess: int) -> Tensor:
    """Return the `excess` places of the smallest offsets, the last of equal ones; if negative, of the largest ones."""
    if excess < 0:
        number = min(-excess, len(places))
        edge = -(-offsets).kthvalue(number).values
        inside = offsets > edge
    else:
        number = excess
        edge = offsets.kthvalue(number).values
        inside = offsets < edge
    tied = places[offsets == edge]
    missing = number - int(inside.sum())
    return torch.cat([places[inside], tied[:missing] if excess < 0 else tied[len(tied) - missing :]])


def _rounded_down(threshold: Tensor, like: Tensor) -> Tensor:
    """Return the largest values of like's dtype that are no larger than the thresholds."""
    rounded = threshold.to(like.dtype)
    too_large = rounded.to(threshold.dtype) > threshold
    return torch.where(too_large, _stepped(rounded, -1), rounded)


def _surviving(limit: Tensor, threshold: Tensor) -> Tensor:
    """Return the smallest values above `limit` whose distance from the threshold is not 0 in their dtype."""
    value = _stepped(limit, 1)
    for _ in range(64):
        lost = (value.to(threshold.dtype) - threshold).to(value.dtype) <= 0
        if not bool(lost.any()):
            break
        value = torch.where(lost, _stepped(value, 1), value)
    return value


def _stepped(values: Tensor, step: int) -> Tensor:
    """Return the next values of a dtype above (1) or below (-1) values that are not negative."""
    integers = INTEGERS[values.dtype.itemsize]
    bits = values.contiguous().view(integers)
    return (bits + step).clamp(min=0).view(values.dtype)
