"""The number of each weight's elements to keep so that all together cost a budget: exact counts, ties included.

An element is kept if its pruning offset lies above a common cut. Elements on the cut, equal up to rounding, are kept in
the order of the weights, and of the elements in a weight, until the budget is used up. So the cost is met to within one
element for any values.

The elements are read once, piece by piece. A sample gives two offsets that the cut lies between. Elements above both
are counted, and only the elements between them are searched. The result is on the host. If the weights are spread over
processes, each process reads its own elements, and the processes exchange sums of whole numbers, minima and maxima. So
the result equals the result of a single process, bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from str_triton.budget.cut_value import cut_value
from str_triton.budget.processes import ALONE, Processes

PIECE = 1 << 18  # Elements at a time: few enough for a processor's caches.
SAMPLE = 1 << 17  # Elements from which the bracket of the cut is guessed.


@dataclass
class Source:
    """One weight that takes part in a common cut.

    Attributes:
        weight: the dense weight, of any shape and on any device. For a weight that is spread over processes: this
            process's rows, which may be none.
        inverse: g^-1, which turns a magnitude into an offset.
        reference: the raw threshold's place in the common order, of a shape that broadcasts to `weight`: an element's
            offset is inverse(|element|) - reference.
        cost: cost of one element, >= 0.
        floor: number of elements to keep in any case.
        size: number of elements of the weight in all processes; None: the number of elements of `weight`.
    """

    weight: Tensor
    inverse: Callable[[Tensor], Tensor]
    reference: Tensor
    cost: int = 1
    floor: int = 0
    size: int | None = None

    @property
    def elements(self) -> int:
        """The number of elements in all processes."""
        return self.weight.numel() if self.size is None else self.size

    def pieces(self) -> Iterator[Tensor]:
        """Yield the offsets as float32, flat, in the order of the elements."""
        weight = self.weight.detach()
        if weight.dim() == 0:
            weight = weight.reshape(1)
        rows = max(1, PIECE // max(1, weight.shape[1:].numel()))
        varies = self.reference.numel() > 1
        for start in range(0, max(1, weight.shape[0]), rows):
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
    """The result of `allocate`.

    Attributes:
        offset: the common offset. Elements above it are kept; ties are not resolved by it.
        kept: for each source the number of its elements to keep.
        caps: for each source the largest offset at which its floor survives; inf where the common offset is below it.
    """

    offset: float
    kept: list[int]
    caps: list[float] = field(default_factory=list)


class NotANumberError(ValueError):
    """A weight holds NaN, so that no order of its elements exists; `index` is the weight's number."""

    def __init__(self, index: int) -> None:
        super().__init__("a weight holds NaN")
        self.index = index


def allocate(sources: Sequence[Source], budget: int, processes: Processes = ALONE) -> Allocation:
    """Keep the elements with the largest offsets that cost at most `budget` together, and every source's floor.

    Elements of 0 (offset -inf) are never kept. Every process calls this, each with its own rows of the weights.

    Raises:
        NotANumberError: a weight holds NaN.
    """
    floored: dict[int, int] = {}
    caps = [math.inf] * len(sources)
    while True:
        free = [i for i in range(len(sources)) if i not in floored]
        left = budget - sum(sources[i].cost * count for i, count in floored.items())
        try:
            cut = _cut([sources[i] for i in free], max(left, 0), processes)
        except NotANumberError as error:
            raise NotANumberError(free[error.index]) from None
        kept = dict(zip(free, cut.kept, strict=True)) | floored
        low = [i for i in free if kept[i] < sources[i].floor]
        if not low:
            return Allocation(cut.offset, [kept[i] for i in range(len(sources))], caps)
        for i in low:
            floored[i], caps[i] = _floor(sources[i], processes)
        if len(floored) == len(sources):
            return Allocation(max(caps), [floored[i] for i in range(len(sources))], caps)


def _floor(source: Source, processes: Processes) -> tuple[int, float]:
    """Return how many elements a source's floor keeps, and the largest offset that keeps at least these."""
    cut = _cut([replace(source, cost=1)], source.floor, processes)
    return cut.kept[0], cut.offset if cut.kept[0] else math.inf


def _between(below: float, above: float) -> float:
    """Return an offset that cuts `below` and keeps `above`."""
    if math.isinf(below):
        return above - 1 if math.isfinite(above) else (0.0 if below < 0 else below)
    return (below + above) / 2 if math.isfinite(above) else below + 1


def _cut(sources: Sequence[Source], budget: int, processes: Processes) -> Allocation:
    if sum(source.cost * source.elements for source in sources) <= budget:
        return _keep_all(sources, processes)
    low, high = _bracket(sources, budget, processes)
    while True:
        above, values, owners = _candidates(sources, low, high, processes)
        left = budget - sum(source.cost * count for source, count in zip(sources, above, strict=True))
        if left < 0:
            high = math.inf  # The sample's bracket was wrong.
            continue
        cut = cut_value(values, torch.tensor([source.cost for source in sources])[owners], left, processes)
        below, beyond = _neighbors(values, cut, processes)
        # The offset lies between the cut and its neighbor, which may lie outside.
        if low > -math.inf and (cut is None or below == -math.inf):
            low = -math.inf
        elif high < math.inf and beyond == math.inf:
            high = math.inf
        else:
            return _divide(sources, above, values, owners, left, cut, below, beyond, processes)


def _bracket(sources: Sequence[Source], budget: int, processes: Processes) -> tuple[float, float]:
    """Guess two offsets that the cut lies between, from every n-th element."""
    total = sum(source.elements for source in sources)
    step = max(1, total // SAMPLE) | 1  # Odd, so that it does not walk down a column of a matrix.
    if step == 1:
        return -math.inf, math.inf
    samples = [torch.cat([piece[::step] for piece in source.pieces()]).cpu() for source in sources]
    costs = torch.repeat_interleave(
        torch.tensor([source.cost * step for source in sources]), torch.tensor([len(sample) for sample in samples])
    )
    values = torch.cat(samples).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    # Four standard deviations of the cost of a sample, and a little more.
    mean_square = sum(source.cost**2 * source.elements for source in sources) / total
    margin = int((16 + 4 * math.sqrt(total / step)) * math.sqrt(mean_square) * step)
    low = cut_value(values, costs, budget + margin, processes)
    high = cut_value(values, costs, budget - margin, processes) if budget > margin else None
    return -math.inf if low is None else low, math.inf if high is None else high


def _candidates(
    sources: Sequence[Source], low: float, high: float, processes: Processes
) -> tuple[list[int], Tensor, Tensor]:
    """Return for each source the number of offsets above `high` in all processes; and this process's offsets in [low,
    high], with the source of each.

    Elements of 0, whose offset is -inf, are left out.
    """
    above = torch.zeros(len(sources), dtype=torch.int64)
    found, owners, with_nan = [], [], len(sources)
    for number, source in enumerate(sources):
        for piece in source.pieces():
            if math.isnan(float(piece.sum())) and bool(piece.isnan().any()):
                with_nan = min(with_nan, number)
            piece = piece[(piece >= low) & (piece > -torch.inf)]
            is_above = piece > high
            above[number] += int(is_above.sum())
            found.append(piece[~is_above].cpu())
            owners.append(torch.full((len(found[-1]),), number))
    _check_numbers(with_nan, len(sources), processes)
    return processes.sum(above).tolist(), torch.cat(found), torch.cat(owners)


def _check_numbers(with_nan: int, number: int, processes: Processes) -> None:
    """Raise NotANumberError if a process has found NaN; `with_nan` is its first weight with NaN."""
    first = int(processes.least(torch.tensor(with_nan)))
    if first < number:
        raise NotANumberError(first)


def _neighbors(values: Tensor, cut: float | None, processes: Processes) -> tuple[float, float]:
    """Return the largest value below the cut and the smallest value above it; -inf and inf if there is none.

    Without a cut: -inf, and the smallest value of all.
    """
    lower = values[:0] if cut is None else values[values < cut]
    upper = values if cut is None else values[values > cut]
    below = processes.most(lower.amax() if len(lower) else torch.tensor(-math.inf))
    beyond = processes.least(upper.amin() if len(upper) else torch.tensor(math.inf))
    return float(below), float(beyond)


def _divide(
    sources: Sequence[Source],
    above: list[int],
    values: Tensor,
    owners: Tensor,
    left: int,
    cut: float | None,
    below: float,
    beyond: float,
    processes: Processes,
) -> Allocation:
    """Keep candidates from the largest down until `left` is used up; on the cut in the order of the sources."""
    if cut is None:  # Only elements of 0 are left to cut.
        counts = _counts(above, owners, processes)
        return Allocation(beyond - 1 if math.isfinite(beyond) else 0.0, counts)
    counts = _counts(above, owners[values > cut], processes)
    left -= sum(source.cost * (n - m) for source, n, m in zip(sources, counts, above, strict=True))
    any_tied_is_kept = False
    for number, count in enumerate(_counts([0] * len(sources), owners[values == cut], processes)):
        cost = sources[number].cost
        more = count if cost == 0 else min(count, left // cost)
        counts[number] += more
        left -= more * cost
        any_tied_is_kept |= more > 0
    # No offset cuts inf.
    keeps_cut = any_tied_is_kept or cut == math.inf
    return Allocation(_between(below, cut) if keeps_cut else _between(cut, beyond), counts)


def _counts(above: list[int], owners: Tensor, processes: Processes) -> list[int]:
    own = processes.sum(owners.bincount(minlength=len(above)))
    return [a + b for a, b in zip(above, own.tolist(), strict=True)]


def _keep_all(sources: Sequence[Source], processes: Processes) -> Allocation:
    """Cut nothing but elements of 0."""
    lowest, with_nan = math.inf, len(sources)
    kept = torch.zeros(len(sources), dtype=torch.int64)
    for number, source in enumerate(sources):
        for piece in source.pieces():
            if not len(piece):
                continue
            smallest = float(piece.amin())
            if math.isnan(smallest):
                with_nan = min(with_nan, number)
            if smallest == -math.inf:
                piece = piece[piece > -torch.inf]
                smallest = float(piece.amin()) if len(piece) else math.inf
            lowest = min(lowest, smallest)
            kept[number] += len(piece)
    _check_numbers(with_nan, len(sources), processes)
    lowest = float(processes.least(torch.tensor(lowest)))
    return Allocation(lowest - 1 if math.isfinite(lowest) else 0.0, processes.sum(kept).tolist())
