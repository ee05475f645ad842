"""How the weights that a network may keep are shared out to its layers: whole numbers that add up exactly."""

from collections.abc import Callable, Sequence

import torch


def uniform(shapes: Sequence[torch.Size], total: int) -> list[int]:
    """Every layer keeps the same share of its weights."""
    sizes = [shape.numel() for shape in shapes]
    return apportion([total * size / sum(sizes) for size in sizes], sizes, total)


def erdos_renyi_kernel(shapes: Sequence[torch.Size], total: int) -> list[int]:
    """ERK (Evci et al., 2020): a layer's density is proportional to sum(shape) / numel, at most 1.

    A layer that would pass 1 is dense, and the others share what it leaves, which may bring further ones there.
    """
    sizes, dense = [shape.numel() for shape in shapes], set()
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
    """Whole numbers near ``shares`` that add up to ``total``, each from 1 to its size.

    Shares are rounded down; what that leaves goes, one by one, to those that lost most (the largest remainders).

    Raises:
        ValueError: fewer than one for each, or more than there are.
    """
    if not len(sizes) <= total <= sum(sizes):
        raise ValueError(
            f"the target cannot be met: it leaves {total:,} of {sum(sizes):,} weights to {len(sizes)} layers, "
            "which need one each"
        )
    keep = [min(max(int(share), 1), size) for share, size in zip(shares, sizes, strict=True)]
    order = sorted(range(len(keep)), key=lambda i: keep[i] - shares[i])
    left = total - sum(keep)
    step = 1 if left > 0 else -1  # below 0 where layers were given their first weight
    while left:
        for i in order[::step]:
            if left and 1 <= keep[i] + step <= sizes[i]:
                keep[i] += step
                left -= step
    return keep
