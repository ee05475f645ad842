"""Exact numbers of surviving elements, also for elements that a threshold cannot tell apart."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from str_triton.budget.cut_value import INTEGERS, cut_value
from str_triton.budget.processes import ALONE, Processes
from str_triton.budget.raw_thresholds import raws_for_rows
from str_triton.nn import ThresholdedWeight
from str_triton.nn.shards import flat_range, shard_dimension


class Moved:
    """The elements of some weights that were moved across their thresholds, and the values to put back.

    If weights are spread over processes, each process holds the moves in its own rows, and all call the methods
    together.
    """

    def __init__(self, weights: Sequence[ThresholdedWeight]) -> None:
        self.weights = weights
        self._changes: list[
            tuple[int, Tensor, Tensor]
        ] = []  # A weight's number, places in this process's rows, values.

    def keep_exactly(self, counts: Sequence[int], processes: Processes) -> None:
        """Let each weight keep as many elements as `counts` says."""
        raws = raws_for_rows(self.weights, processes)
        survivors = [_survivors(weight, raw).sum() for weight, raw in zip(self.weights, raws, strict=True)]
        left = processes.sum_once(survivors, [weight.dense for weight in self.weights]).tolist()
        for number, (weight, raw) in enumerate(zip(self.weights, raws, strict=True)):
            excess = left[number] - counts[number]
            alone = shard_dimension(weight.dense) is None
            changed = keep_exactly(weight, raw, excess, ALONE if alone else processes) if excess else None
            if changed is not None:
                self._changes.append((number, *changed))

    def put_back(self) -> None:
        """Undo all moves."""
        for number, places, values in self._changes:
            put(self.weights[number].local_dense, places, values)
        self._changes = []

    def state(self) -> list[tuple[int, Tensor, Tensor]]:
        """Return the moves of all processes: a weight's number, places in all of the flattened weight, old values."""
        changes = {number: (places, values) for number, places, values in self._changes}
        state = []
        for number, weight in enumerate(self.weights):
            none = weight.local_dense.flatten()[:0]
            places, values = changes.get(number, (none.to(torch.int64), none))
            processes = Processes.of([weight.dense])
            places, values = processes.joined(places + flat_range(weight.dense)[0]), processes.joined(values)
            if len(places):
                state.append((number, places.clone(), values.clone()))
        return state

    def load(self, state: Iterable[tuple[int, Tensor, Tensor]]) -> None:
        """Undo the moves in a state. The weights that were saved with it contain the moves."""
        for number, places, values in state:
            dense = self.weights[number].local_dense
            first, last = flat_range(self.weights[number].dense)
            own = (places >= first) & (places < last)
            put(dense, places[own].to(dense.device) - first, values[own].to(dense.device))


@torch.no_grad()
def keep_exactly(
    weight: ThresholdedWeight, raw: Tensor, excess: int, processes: Processes
) -> tuple[Tensor, Tensor] | None:
    """Move elements of the dense weight across the threshold, as few as possible, until `excess` fewer survive.

    If too many survive, the smallest (the last among equal ones) get the magnitude of the threshold, rounded down, so
    that they are pruned. If too few survive (`excess` is negative), the largest of the others (the first among equal
    ones) get the next larger magnitude that survives. Elements of 0 stay.

    The processes over which the weight is spread call this together. Each changes its own rows, to which `raw`, a part
    of the raw threshold, belongs.

    Returns:
        The places that changed, int64 [n] into this process's rows, flattened, and the old values, [n]; None if
        no element changed.
    """
    dense, threshold = weight.local_dense, weight.holder.threshold_of(raw)
    flat, survivors = dense.flatten(), _survivors(weight, raw).flatten()
    places = (survivors if excess > 0 else ~survivors & (flat != 0)).nonzero().squeeze(1)
    places = _extreme(places, weight.holder.offsets_from(dense, raw).flatten()[places], excess, processes)
    if len(places) == 0:
        return None
    old = flat[places]
    threshold = threshold.expand(dense.shape).flatten()[places] if threshold.numel() > 1 else threshold.reshape(1)
    limit = _rounded_down(threshold, old)
    new = limit if excess > 0 else _surviving(limit, threshold)
    put(dense, places, torch.copysign(new.expand_as(old), old))
    return places, old


@torch.no_grad()
def _survivors(weight: ThresholdedWeight, raw: Tensor) -> Tensor:
    return weight.holder.apply_threshold(weight.local_dense, raw) != 0


@torch.no_grad()
def put(dense: Tensor, places: Tensor, values: Tensor) -> None:
    """Write values [n] to places [n] of the flattened tensor, in place, whatever its memory format."""
    dense[torch.unravel_index(places, dense.shape)] = values


def _extreme(places: Tensor, offsets: Tensor, excess: int, processes: Processes) -> Tensor:
    """Return the `excess` places of the smallest offsets, the last of equal ones; if negative, of the largest ones.

    Each process gets the ones among its own places.
    """
    order = offsets if excess < 0 else -offsets  # The caller asks for the largest ones.
    cut = cut_value(order, 1, abs(excess), processes)
    if cut is None:
        return places
    inside, tied = order > cut, places[order == cut]
    missing = abs(excess) - int(processes.sum(inside.sum()))
    counts, rank = processes.by_rank(len(tied)), processes.rank
    if excess < 0:  # The processes before this one have the first places.
        own = max(0, missing - sum(counts[:rank]))
        tied = tied[:own]
    else:
        own = max(0, missing - sum(counts[rank + 1 :]))
        tied = tied[max(0, len(tied) - own) :]
    return torch.cat([places[inside], tied])


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
