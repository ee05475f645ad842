"""Soft threshold of a list of tensors in one launch: the op of soft_threshold.py, for all weights of a model at once.

The results lie one behind the other in one flat buffer, which the registered ops return (their outputs may not be views
of one another) and the autograd Function splits. On a GPU a table tells each program which tensor it serves.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.soft_threshold import (
    BLOCK,
    _backward,
    _blocks,
    _check_options,
    _check_pair,
    _compute_dtype,
    _flat,
    _forward,
    _laid_out,
    _per_weight,
    _prepared,
    _rows,
    _triton_dtype,
)

# ---- reference, and CPU implementation ----------------------------------------------------------------------------


def _forward_many(xs: list[Tensor], raws: list[Tensor], g: str) -> Tensor:
    starts, _ = _flat_starts(xs)
    flat = _flat_buffer(xs[0], xs)
    for x, raw, start in zip(xs, raws, starts, strict=True):
        _view(flat, x, start).copy_(_forward(x, raw, g))
    return flat


def _backward_many(
    grads: list[Tensor], flat: Tensor, raws: list[Tensor], g: str, masked: bool
) -> tuple[Tensor, Tensor]:
    starts, _ = _flat_starts(grads)
    grad_flat = _flat_buffer(flat, grads if masked else [])
    grad_raws = []
    for grad, raw, start in zip(grads, raws, starts, strict=True):
        grad_x, grad_raw = _backward(grad, _view(flat, grad, start), raw, g, masked)
        grad_raws.append(_flat(grad_raw))
        if masked:
            _view(grad_flat, grad, start).copy_(grad_x)
    return grad_flat, torch.cat(grad_raws)


# ---- Triton implementation ----------------------------------------------------------------------------------------


def _forward_many_triton(xs: list[Tensor], raws: list[Tensor], g: str) -> Tensor:
    """One launch for the whole list: each program looks its tensor up in a table."""
    from str_triton.kernels import soft_threshold as kernels

    flat = _flat_buffer(xs[0], xs)
    plan = _Plan(xs, raws)
    if plan.programs:
        with torch.cuda.device_of(flat):
            kernels.soft_threshold_many_kernel[(plan.programs,)](
                plan.owners, plan.table, xs[0], raws[0], flat,
                G=g, PER_WEIGHT=plan.per_weight, COMPUTE=plan.compute, BLOCK=BLOCK, ALIGNED=plan.aligned,
            )  # fmt: skip
    return flat


def _backward_many_triton(
    grads: list[Tensor], flat: Tensor, raws: list[Tensor], g: str, masked: bool
) -> tuple[Tensor, Tensor]:
    """One launch for the whole list, and one that sums the partials of every raw threshold in a fixed order."""
    from str_triton.kernels import soft_threshold as kernels

    plan = _Plan(grads, raws)
    grad_flat = _flat_buffer(flat, grads if masked else [])
    grad_raw = _flat_buffer(raws[0], grads) if plan.per_weight else raws[0].new_zeros(plan.raw_count)
    if plan.programs:
        partial = flat.new_empty(0 if plan.per_weight else plan.programs, dtype=_compute_dtype(flat, raws[0]))
        options = {"G": g, "COMPUTE": plan.compute, "BLOCK": BLOCK}
        with torch.cuda.device_of(flat):
            kernels.soft_threshold_many_backward_kernel[(plan.programs,)](
                plan.owners, plan.table, grads[0], flat, raws[0], grad_flat, grad_raw, partial,
                MASKED=masked, PER_WEIGHT=plan.per_weight, ALIGNED=plan.aligned, **options,
            )  # fmt: skip
            if not plan.per_weight:
                kernels.soft_threshold_many_reduce_kernel[(plan.raw_count,)](
                    plan.raw_owners, plan.table, partial, raws[0], grad_raw, **options
                )
    if plan.per_weight:
        grad_raw = torch.cat([_flat(_view(grad_raw, x, start)) for x, start in zip(grads, plan.starts, strict=True)])
    return grad_flat, grad_raw


class _Plan:
    """Which program serves which tensor of a list, and where each tensor lies: the table that the kernels read."""

    def __init__(self, xs: list[Tensor], raws: list[Tensor]):
        views = [_rows(x, raw) for x, raw in zip(xs, raws, strict=True)]
        programs = [rows * _blocks(cols) for rows, cols, _ in views]
        raw_counts = [raw.numel() for raw in raws]
        self.starts, _ = _flat_starts(xs)
        self.programs = sum(programs)
        self.raw_count = sum(raw_counts)
        self.per_weight = any(per_weight for _, _, per_weight in views)
        self.compute = _triton_dtype(xs[0], raws[0])
        # What a load of 16 bytes at once needs.
        self.aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (xs + raws if self.per_weight else xs))
        device = xs[0].device
        # Copied on this stream, and therefore only there sure to have arrived.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self.owners = _owners(tuple(programs), device, stream)
        self.raw_owners = _owners(tuple(raw_counts), device, stream)
        self.table = _to_device(
            tuple(
                number
                for x, raw, (_, cols, _), start, first, first_raw in zip(
                    xs, raws, views, self.starts, _exclusive_sums(programs), _exclusive_sums(raw_counts), strict=True
                )
                for number in (x.data_ptr(), raw.data_ptr(), cols, start, first, first_raw)
            ),
            device,
            stream,
        )


@lru_cache(maxsize=64)
def _owners(counts: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """counts[0] zeros, counts[1] ones, ...: the tensor that each program serves."""
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return owners.to(device)


@lru_cache(maxsize=64)
def _to_device(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Parameters keep their addresses, so that a training loop copies its table once."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


# ---- memory layout ------------------------------------------------------------------------------------------------


def _exclusive_sums(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))[:-1]


def _flat_starts(xs: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in the flat buffer (multiples of 16 elements), and the buffer's length."""
    padded = [-(-x.numel() // 16) * 16 for x in xs]
    return _exclusive_sums(padded), sum(padded)


def _flat_buffer(like: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """Room for all of xs; the elements between them, which belong to none, are 0."""
    _, total = _flat_starts(xs)
    return like.new_empty(total) if total == sum(x.numel() for x in xs) else like.new_zeros(total)


def _view(flat: Tensor, like: Tensor, start: int) -> Tensor:
    return flat.narrow(0, start, like.numel()).as_strided(like.shape, like.stride())


# ---- registration -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("str_triton", "FRAGMENT")
_LIBRARY.define("soft_threshold_many(Tensor[] xs, Tensor[] raws, str g) -> Tensor")
_LIBRARY.define(
    "soft_threshold_many_backward(Tensor[] grads, Tensor flat, Tensor[] raws, str g, bool masked) -> (Tensor, Tensor)"
)
_LIBRARY.impl("soft_threshold_many", _forward_many, "CPU")
_LIBRARY.impl("soft_threshold_many", _forward_many_triton, "CUDA")
_LIBRARY.impl("soft_threshold_many_backward", _backward_many, "CPU")
_LIBRARY.impl("soft_threshold_many_backward", _backward_many_triton, "CUDA")


@torch.library.register_fake("str_triton::soft_threshold_many")
def _(xs, raws, g):
    return xs[0].new_empty(_flat_starts(xs)[1])


@torch.library.register_fake("str_triton::soft_threshold_many_backward")
def _(grads, flat, raws, g, masked):
    return flat.new_empty(flat.shape if masked else 0), raws[0].new_empty(sum(raw.numel() for raw in raws))


# ---- autograd -----------------------------------------------------------------------------------------------------


class _SoftThresholdMany(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, g, masked, *tensors):
        pairs = [_prepared(x, raw) for x, raw in zip(tensors[:count], tensors[count:], strict=True)]
        xs, raws = [x for x, _ in pairs], [raw for _, raw in pairs]
        flat = torch.ops.str_triton.soft_threshold_many(xs, raws, g)
        ctx.save_for_backward(flat, *raws)
        ctx.strides = [x.stride() for x in xs]
        ctx.g, ctx.masked = g, masked
        return tuple(_view(flat, x, start) for x, start in zip(xs, _flat_starts(xs)[0], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        flat, *raws = ctx.saved_tensors
        grads = [_laid_out(grad, strides) for grad, strides in zip(grads, ctx.strides, strict=True)]
        grad_flat, grad_raw = torch.ops.str_triton.soft_threshold_many_backward(grads, flat, raws, ctx.g, ctx.masked)
        if ctx.masked:
            grads = [_view(grad_flat, grad, start) for grad, start in zip(grads, _flat_starts(grads)[0], strict=True)]
        pieces = grad_raw.split([raw.numel() for raw in raws])
        grad_raws = [_view(piece, raw, 0) for piece, raw in zip(pieces, raws, strict=True)]
        return None, None, None, *grads, *grad_raws


# ---- public function ----------------------------------------------------------------------------------------------


def soft_threshold_many(
    xs: Sequence[Tensor], raw_thresholds: Sequence[Tensor], *, g: str = "sigmoid", gradient: str = "masked"
) -> list[Tensor]:
    """`soft_threshold` for a list of tensors, in one kernel launch on a GPU (two in the backward), whatever its length.

    The results, and the gradient of each use of a tensor, have the same bits as those of a loop over `soft_threshold`.

    Args:
        xs: tensors of any shapes, of one dtype and on one device.
        raw_thresholds: one for each x, as in `soft_threshold`, of one dtype; either all per weight or none.
        g, gradient: as in `soft_threshold`.

    Returns:
        One tensor for each x: views of one buffer, which do not share memory.

    Raises:
        TypeError, ValueError: as `soft_threshold`; also lists of different lengths or of mixed dtypes or devices.
    """
    _check_options(g, gradient)
    xs, raws = list(xs), list(raw_thresholds)
    if len(xs) != len(raws):
        raise ValueError(f"xs and raw_thresholds must be of the same length, got {len(xs)} and {len(raws)}")
    if not xs:
        return []
    for x, raw in zip(xs, raws, strict=True):
        _check_pair(x, raw)
    for name, tensors in (("xs", xs), ("raw_thresholds", raws)):
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        if len(kinds) > 1:
            raise ValueError(f"{name} must share one dtype and one device, got {sorted(map(str, kinds))}")
    # One element with one threshold goes with either kind.
    if len({_per_weight(x, raw) for x, raw in zip(xs, raws, strict=True) if x.numel() != 1}) > 1:
        raise ValueError("raw_thresholds must be one per weight for all of xs or for none of them")
    tensors = xs + raws
    if torch.compiler.is_compiling():  # It refuses a Function that gets one tensor twice, as a shared threshold.
        tensors = [tensor.view_as(tensor) for tensor in tensors]
    return list(_SoftThresholdMany.apply(len(xs), g, gradient == "masked", *tensors))
