"""Distributions of the weights to keep over the layers: whole numbers whose sum is exact."""

from collections.abc import Callable, Sequence

import torch


def uniform(shapes: Sequence[torch.Size], total: int) -> list[int]:
    """Return how many weights each layer keeps when all layers have the same sparsity."""
    sizes = [shape.numel() for shape in shapes]
    return apportion([total * size / sum(sizes) for size in sizes], sizes, total)


def erdos_renyi_kernel(shapes: Sequence[torch.Size], total: int) -> list[int]:
    """Return how many weights each layer keeps by ERK (Evci et al., 2020): density ~ sum(shape) / numel, at most 1.

    A layer whose density would exceed 1 becomes dense, and the rest is distributed over the others. That repeats until
    no density exceeds 1.
    """
    sizes = [shape.numel() for shape in shapes]
    dense: set[int] = set()
    while True:
        left = total - sum(sizes[i] for i in dense)
        scale = left / max(sum(sum(shape) for i, shape in enumerate(shapes) if i not in dense), 1)
        density = [1.0 if i in dense else scale * sum(shape) / shape.numel() for i, shape in enumerate(shapes)]
        highest = max(density)
        if highest <= 1:
            return apportion([d * size for d, size in zip(density, sizes, strict=True)], sizes, total)
        dense.update(i for i, d in enumerate(density) if d == highest)


DISTRIBUTIONS: dict[str, Callable[[Sequence[torch.Size], int], list[int]]] = {
    "uniform": uniform,
    "erk": erdos_renyi_kernel,
}


def apportion(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Round ``shares`` to whole numbers whose sum is ``total``, each from 1 to its size.

    Shares are rounded down. The rest is added, one by one, to the shares with the largest remainders.

    Raises:
        ValueError: ``total`` is below the number of layers, or above the sum of ``sizes``.
    """
    if not len(sizes) <= total <= sum(sizes):
        raise ValueError(
            f"the target cannot be met: it leaves {total:,} of {sum(sizes):,} weights for {len(sizes)} layers, "
            "and each needs at least one: choose a lower sparsity"
        )
    keep = [min(max(int(share), 1), size) for share, size in zip(shares, sizes, strict=True)]
    order = sorted(range(len(keep)), key=lambda i: keep[i] - shares[i])
    left = total - sum(keep)
    step = 1 if left > 0 else -1  # `left` is negative where shares below 1 were raised to 1
    while left:
        for i in order[::step]:
            if left and 1 <= keep[i] + step <= sizes[i]:
                keep[i] += step
                left -= step
    return keep
