"""How the offsets of a `RankController` are prepared: equal norms, no ties, a component in each matrix, unused room."""

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_largest(offsets: Tensor, tie: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix's sorted offsets, inf for the largest and its equals; and the offset that keeps these."""
    largest = offsets[-1]
    kept = offsets > largest - tie
    kept[-1:].fill_(True)  # The comparison of infinities is false.
    lowest = torch.where(kept, offsets, torch.inf).amin()
    below = torch.where(kept, -torch.inf, offsets).amax()
    cap = torch.where(below.isinf(), lowest - 1, (lowest + below) / 2)
    return torch.where(kept, torch.inf, offsets), torch.where(largest.isinf(), torch.inf, cap)


def filling_shifts(offsets: list[list[float]], costs: list[list[int]], budget: int, tie: float) -> list[float]:
    """Return for each matrix how far to lower its threshold, at most 0, so that components come back that still fit.

    One common offset stops where the next component costs too much, although another matrix's may fit. The components
    with the largest offsets come back first, and in each matrix the larger before the smaller.

    Args:
        offsets: for each matrix the rises of its threshold that cut its components, the largest first: those of the
            components that are left are above 0. Components of size 0 have -inf and do not come back.
        costs: for each matrix its cost at the ranks 0, 1, ... of its components.
        budget: the highest sum of the costs.
        tie: offsets no further apart than this cannot be told apart; such components do not come back.
    """
    ranks = [sum(offset > 0 for offset in row) for row in offsets]
    room = budget - sum(row[rank] for row, rank in zip(costs, ranks, strict=True))
    shifts = [0.0] * len(ranks)
    ended = [[*row, row[-1] - 2] for row in offsets]
    while True:
        fitting = [
            (row[rank], i)
            for i, (row, rank, cost) in enumerate(zip(ended, ranks, costs, strict=True))
            if rank < len(cost) - 1 and row[rank] - row[rank + 1] > tie and cost[rank + 1] - cost[rank] <= room
        ]
        if not fitting:
            return shifts
        offset, i = max(fitting)
        room -= costs[i][ranks[i] + 1] - costs[i][ranks[i]]
        ranks[i] += 1
        shifts[i] = (offset + max(ended[i][ranks[i]], offset - 2)) / 2


def separating_moves(offsets: Sequence[Tensor], tie: Tensor) -> list[Tensor]:
    """Return for each offset of each matrix how far to raise it, so that all lie further apart than `tie`.

    Zeros where they do already.
    """
    ordered, order = torch.cat(list(offsets)).sort(stable=True)
    steps = 2 * tie * torch.arange(len(ordered), device=ordered.device)
    moves = (ordered - steps).cummax(0).values + steps - ordered
    moves = torch.where((ordered.diff() <= tie).any() & (moves > tie / 4), moves, 0)
    moves = torch.empty_like(moves).scatter_(0, order, moves)
    return list(moves.split([len(of_one) for of_one in offsets]))


@torch.no_grad()
def balancing_shifts(raws: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Tensor]:
    """Return how far to move each raw threshold [1], so that exp(raw) is proportional to the norm of the sizes.

    No move is above 0, so that none cuts a component. A matrix without a norm (zeros, NaN) counts as one of norm 1.
    """
    norms = torch.stack([of_one.norm().log() for of_one in sizes]).nan_to_num(0.0, 0.0, 0.0)
    shifts = norms - torch.stack([raw.squeeze() for raw in raws])
    return list(shifts - shifts.amax())
