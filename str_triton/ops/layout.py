"""The memory layout of the soft-threshold ops' tensors: one tensor, and a list in one flat buffer."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

BLOCK = 1024  # Elements per program: the same for every shape, so that a list gives the same bits as a loop.


def _blocks(cols: int) -> int:
    return -(-cols // BLOCK)


def _per_weight(x: Tensor, raw: Tensor) -> bool:
    return raw.numel() != 1 and raw.shape == x.shape


def _rows(x: Tensor, thresholds: int) -> tuple[int, int, bool]:
    """View x in memory order as (rows, elements per row); True if every weight has a threshold of its own."""
    per_weight = thresholds == x.numel() > 1
    if thresholds == 1 or per_weight:
        return 1, x.numel(), per_weight
    return x.shape[0], x.numel() // max(x.shape[0], 1), False


def _flat(x: Tensor) -> Tensor:
    """View a dense tensor as one dimension, in memory order."""
    return x.as_strided((x.numel(),), (1,))


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return x, copied if its elements do not lie at these strides. Strides of dimensions of size 1 do not matter."""
    own = x.stride()
    if own == strides or x.numel() == 0 or all(n == 1 or a == b for n, a, b in zip(x.shape, own, strides, strict=True)):
        return x
    return x.new_empty_strided(x.shape, strides).copy_(x)


def _is_dense(x: Tensor, by_row: bool) -> bool:
    """Return whether x has no gaps and no overlaps in memory; with `by_row` also dimension 0 outermost."""
    if x.is_contiguous():
        return True
    # empty_like keeps the strides of a dense tensor, and of no other.
    is_dense = torch.empty_like(x, device="meta").stride() == x.stride()
    return is_dense and not (by_row and x.shape[0] != 1 and x.stride(0) * x.shape[0] != x.numel())


def _prepared(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and raw_threshold laid out as the registered ops expect x and alpha; copies only what does not fit."""
    per_weight = _per_weight(x, raw)
    x = x if _is_dense(x, by_row=raw.numel() != 1 and not per_weight) else x.contiguous()
    return x, _laid_out(raw, x.stride()) if per_weight else raw.contiguous()


def _starts(counts: Sequence[int], multiple: int = 1) -> tuple[list[int], int]:
    """Return where each of the pieces begins in a flat buffer, at multiples of `multiple`, and the buffer's length."""
    *starts, total = accumulate((-(-count // multiple) * multiple for count in counts), initial=0)
    return starts, total


def _flat_starts(xs: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return where each tensor begins in the flat buffer (multiples of 16 elements), and the buffer's length."""
    return _starts([x.numel() for x in xs], 16)


def _flat_buffer(like: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """Make room for all of xs; the elements between them, which belong to none, are 0."""
    _, total = _flat_starts(xs)
    return like.new_empty(total) if total == sum(x.numel() for x in xs) else like.new_zeros(total)


def _view(flat: Tensor, like: Tensor, start: int) -> Tensor:
    return flat.narrow(0, start, like.numel()).as_strided(like.shape, like.stride())


def _joined(xs: list[Tensor], raws: list[Tensor]) -> Tensor:
    """Put all raw thresholds one behind the other; those of one per weight begin at multiples of 16 elements."""
    pieces = [_flat(raw) for raw in raws]
    if any(_per_weight(x, raw) for x, raw in zip(xs, raws, strict=True)):
        padding = raws[0].new_zeros(15)
        pieces = [part for piece in pieces for part in (piece, padding[: -len(piece) % 16])]
    return torch.cat(pieces)


def _threshold_views(joined: Tensor, xs: list[Tensor], thresholds: list[int]) -> list[Tensor]:
    """Split a buffer of all thresholds into views: one element, one per row of x, or laid out like x."""
    per_weight = any(_rows(x, count)[2] for x, count in zip(xs, thresholds, strict=True))
    starts, _ = _starts(thresholds, 16 if per_weight else 1)
    return [
        _view(joined, x, start)
        if _rows(x, count)[2]
        else joined[start : start + count].view(count, *[1] * (x.dim() - 1))
        for x, count, start in zip(xs, thresholds, starts, strict=True)
    ]
