"""Which components still fit into a budget after one common offset has cut the others."""


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
