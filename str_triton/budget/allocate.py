"""How many of each weight's elements to keep so that all together cost a budget, counted exactly, ties included.

An element whose pruning offset lies above a common cut is kept. Of the elements that lie on the cut itself, equal to
rounding, the first ones are kept, in the order of the weights and in each weight in the order of its elements, while
the budget lasts. So the cost is met to within one element, whatever the values are.

One pass over the elements, piece by piece: a sample tells between which two offsets the cut lies, what lies above them
is counted, and only what lies between them is sorted. The result reaches the host.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PIECE = 1 << 18  # Elements at a time: few enough for a processor's caches.
SAMPLE = 1 << 17  # Elements from which the bracket of the cut is guessed.


@dataclass
class Source:
    """One weight that takes part in a common cut.

    Attributes:
        weight: the dense weight, of any shape, not empty; on any device.
        inverse: g^-1, by which a magnitude becomes an offset.
        reference: the raw threshold's place in the common order, of a shape that broadcasts to `weight`: an element's
            offset is inverse(|element|) - reference.
        cost: of one element, >= 0.
        floor: number of elements to keep in any case.
    """

    weight: Tensor
    inverse: Callable[[Tensor], Tensor]
    reference: Tensor
    cost: int = 1
    floor: int = 0

    def pieces(self) -> Iterator[Tensor]:
        """Yield the offsets as float32, flat, in the order of the elements."""
        weight = self.weight.detach()
        if weight.dim() == 0:
            weight = weight.reshape(1)
        rows = max(1, PIECE // max(1, weight[0].numel()))
        varies = self.reference.numel() > 1
        for start in range(0, weight.shape[0], rows):
            reference = self.reference
            if varies and reference.shape[0] == weight.shape[0]:
                reference = reference[start : start + rows]
            yield self._offsets(weight[start : start + rows], reference)

    def _offsets(self, weight: Tensor, reference: Tensor) -> Tensor:
        magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        reference = reference.reshape(()) if reference.numel() == 1 else reference
        return (self.inverse(magnitude) - reference).to(torch.float32).flatten()


@dataclass
class Allocation:
    """What `allocate` has found.

    Attributes:
        offset: the common offset that keeps what it should up to ties: elements above it are kept.
        kept: for each source the number of its elements to keep.
        caps: for each source the largest offset that leaves its floor; inf where the common offset does.
    """

    offset: float
    kept: list[int]
    caps: list[float] = field(default_factory=list)


class NotANumberError(ValueError):
    """A weight holds NaN, so that no order of its elements exists; `index` is the weight's number."""

    def __init__(self, index: int) -> None:
        super().__init__("a weight holds NaN")
        self.index = index


def allocate(sources: Sequence[Source], budget: int) -> Allocation:
    """Keep as many elements as cost at most `budget`, those with the largest offsets, and every source's floor.

    Elements of 0 (offset -inf) are never kept.

    Raises:
        NotANumberError: a weight holds NaN.
    """
    floored: dict[int, int] = {}
    caps = [math.inf] * len(sources)
    while True:
        free = [i for i in range(len(sources)) if i not in floored]
        left = budget - sum(sources[i].cost * count for i, count in floored.items())
        try:
            cut = _cut([sources[i] for i in free], max(left, 0))
        except NotANumberError as error:
            raise NotANumberError(free[error.index]) from None
        kept = dict(zip(free, cut.kept, strict=True)) | floored
        low = [i for i in free if kept[i] < sources[i].floor]
        if not low:
            return Allocation(cut.offset, [kept[i] for i in range(len(sources))], caps)
        for i in low:
            floored[i], caps[i] = _floor(sources[i])
        if len(floored) == len(sources):
            return Allocation(max(caps), [floored[i] for i in range(len(sources))], caps)


def _floor(source: Source) -> tuple[int, float]:
    """Return how many elements a source's floor keeps, and the largest offset that keeps at least these."""
    offsets = torch.cat(list(source.pieces()))
    top = offsets.topk(min(source.floor, offsets.numel())).values
    top = top[top > -torch.inf]
    if not len(top):
        return 0, math.inf
    last = float(top[-1])
    return len(top), _between(float(offsets.where(offsets < last, -torch.inf).amax()), last)


def _between(below: float, above: float) -> float:
    """Return an offset that cuts `below` and keeps `above`."""
    if math.isinf(below):
        return above - 1 if math.isfinite(above) else (0.0 if below < 0 else below)
    return (below + above) / 2 if math.isfinite(above) else below + 1


def _cut(sources: Sequence[Source], budget: int) -> Allocation:
    sizes = [source.weight.numel() for source in sources]
    if sum(source.cost * size for source, size in zip(sources, sizes, strict=True)) <= budget:
        return _keep_all(sources)
    low, high = _bracket(sources, budget)
    while True:
        above, values, owners = _candidates(sources, low, high)
        left = budget - sum(source.cost * count for source, count in zip(sources, above, strict=True))
        costs = torch.tensor([source.cost for source in sources])[owners]
        if left < 0 and high < math.inf:
            high = math.inf  # The sample misled.
        elif int(costs.sum()) <= left and low > -math.inf:
            low = -math.inf
        else:
            return _divide(sources, above, values, owners, costs, left, low, high)


def _bracket(sources: Sequence[Source], budget: int) -> tuple[float, float]:
    """Guess two offsets that the cut lies between, from every n-th element."""
    total = sum(source.weight.numel() for source in sources)
    step = max(1, total // SAMPLE) | 1  # Odd, so that it does not walk down a column of a matrix.
    if step == 1:
        return -math.inf, math.inf
    samples = [torch.cat([piece[::step] for piece in source.pieces()]).cpu() for source in sources]
    costs = torch.repeat_interleave(
        torch.tensor([float(source.cost * step) for source in sources], dtype=torch.float64),
        torch.tensor([len(sample) for sample in samples]),
    )
    values, order = torch.cat(samples).sort(descending=True)
    place = int((costs[order].cumsum(0) <= budget).sum())
    margin = 16 + 4 * math.isqrt(len(values))
    high = float(values[place - margin]) if place > margin else math.inf
    low = float(values[place + margin]) if place + margin < len(values) else -math.inf
    return low, high


def _candidates(sources: Sequence[Source], low: float, high: float) -> tuple[list[int], Tensor, Tensor]:
    """Return for each source the number of offsets above `high`; all in [low, high], and the source that each is of.

    Elements of 0, whose offset is -inf, are left out.
    """
    above, found, owners = [0] * len(sources), [], []
    for number, source in enumerate(sources):
        for piece in source.pieces():
            if math.isnan(float(piece.sum())) and bool(piece.isnan().any()):
                raise NotANumberError(number)
            piece = piece[(piece >= low) & (piece > -torch.inf)]
            is_above = piece > high
            above[number] += int(is_above.sum())
            found.append(piece[~is_above].cpu())
            owners.append(torch.full((len(found[-1]),), number))
    return above, torch.cat(found), torch.cat(owners)


def _divide(
    sources: Sequence[Source],
    above: list[int],
    values: Tensor,
    owners: Tensor,
    costs: Tensor,
    left: int,
    low: float,
    high: float,
) -> Allocation:
    """Keep candidates from the largest down while `left` lasts, those on the cut in the order of the sources."""
    values, order = values.sort(descending=True, stable=True)
    owners, costs = owners[order], costs[order]
    place = int((costs.cumsum(0) <= left).sum())
    if place == len(values):  # Only elements of 0 are left to cut.
        lowest = float(values[-1]) if len(values) else high
        return Allocation(lowest - 1 if math.isfinite(lowest) else 0.0, _counts(above, owners))
    cut = values[place]
    kept, tied = values > cut, values == cut
    left -= int(costs[kept].sum())
    counts = _counts(above, owners[kept])
    any_tied_is_kept = False
    for number, count in enumerate(owners[tied].bincount(minlength=len(sources)).tolist()):
        cost = sources[number].cost
        more = count if cost == 0 else min(count, left // cost)
        counts[number] += more
        left -= more * cost
        any_tied_is_kept |= more > 0
    after, before = values[values < cut], values[kept]
    if any_tied_is_kept:
        offset = _between(float(after[0]) if len(after) else low, float(cut))
    else:
        offset = _between(float(cut), float(before[-1]) if len(before) else high)
    return Allocation(offset, counts)


def _counts(above: list[int], owners: Tensor) -> list[int]:
    return [a + b for a, b in zip(above, owners.bincount(minlength=len(above)).tolist(), strict=True)]


def _keep_all(sources: Sequence[Source]) -> Allocation:
    """Cut nothing but elements of 0."""
    lowest, kept = math.inf, []
    for number, source in enumerate(sources):
        count = 0
        for piece in source.pieces():
            smallest = float(piece.amin())
            if math.isnan(smallest):
                raise NotANumberError(number)
            if smallest == -math.inf:
                piece = piece[piece > -torch.inf]
                smallest = float(piece.amin()) if len(piece) else math.inf
            lowest, count = min(lowest, smallest), count + len(piece)
        kept.append(count)
    return Allocation(lowest - 1 if math.isfinite(lowest) else 0.0, kept)
