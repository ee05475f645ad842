"""Soft threshold of a list of tensors in one launch: the op of soft_threshold.py, for all weights of a model at once.

One flat buffer holds the results, one behind the other, and another holds the thresholds. On a GPU each program finds
its tensor in tables, which hold the tensors' addresses. The addresses of gradients change from step to step. They reach
the GPU as arguments of a launch, not as a copy from the host: so nothing waits for the device, and a CUDA graph can
capture all of it.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.layout import (
    BLOCK,
    _blocks,
    _flat,
    _flat_buffer,
    _flat_starts,
    _joined,
    _laid_out,
    _per_weight,
    _prepared,
    _rows,
    _starts,
    _threshold_views,
    _view,
)
from str_triton.ops.registration import differentiable, function, is_strict_export, op
from str_triton.ops.soft_threshold import _backward, _check_options, _check_pair, _forward
from str_triton.ops.tensors import compute_dtype
from str_triton.ops.thresholds import threshold_function

NUMBERS = 64  # Integers per launch of the kernel that writes a table.


def _forward_many(xs: list[Tensor], alpha: Tensor, thresholds: list[int]) -> Tensor:
    starts, _ = _flat_starts(xs)
    flat = _flat_buffer(xs[0], xs)
    for x, piece, start in zip(xs, _threshold_views(alpha, xs, thresholds), starts, strict=True):
        _view(flat, x, start).copy_(_forward(x, piece))
    return flat


def _backward_many(
    grads: list[Tensor], flat: Tensor, slope: Tensor | None, thresholds: list[int], masked: bool
) -> tuple[Tensor, Tensor]:
    starts, _ = _flat_starts(grads)
    grad_flat = _flat_buffer(flat, grads if masked else [])
    grad_raw = flat.new_empty(0) if slope is None else torch.zeros_like(slope)
    slopes: Sequence[Tensor | None] = [None] * len(grads)
    grad_raws = slopes
    if slope is not None:
        slopes, grad_raws = (_threshold_views(buffer, grads, thresholds) for buffer in (slope, grad_raw))
    for grad, start, piece, out_piece in zip(grads, starts, slopes, grad_raws, strict=True):
        grad_x, grad_piece = _backward(grad, _view(flat, grad, start), piece, masked)
        if out_piece is not None:
            out_piece.copy_(grad_piece)
        if masked:
            _view(grad_flat, grad, start).copy_(grad_x)
    return grad_flat, grad_raw


def _forward_many_triton(xs: list[Tensor], alpha: Tensor, thresholds: list[int]) -> Tensor:
    """Launch once for the whole list: each program looks its tensor up in a table."""
    from str_triton.kernels import soft_threshold as kernels

    flat = _flat_buffer(xs[0], xs)
    tables = _Tables(xs, thresholds)
    if len(tables.owners):
        with torch.cuda.device_of(flat):
            kernels.soft_threshold_many_kernel[(len(tables.owners),)](
                tables.owners, tables.layout, tables.addresses, xs[0], alpha, flat,
                PER_WEIGHT=tables.per_weight, BLOCK=BLOCK, ALIGNED=tables.aligned,
            )  # fmt: skip
    return flat


def _backward_many_triton(
    grads: list[Tensor], flat: Tensor, slope: Tensor | None, thresholds: list[int], masked: bool
) -> tuple[Tensor, Tensor]:
    """Launch once for the whole list, and once more to sum the partials of every threshold in a fixed order."""
    from str_triton.kernels import soft_threshold as kernels

    tables = _Tables(grads, thresholds)
    grad_flat = _flat_buffer(flat, grads if masked else [])
    grad_raw = flat.new_empty(0) if slope is None else torch.zeros_like(slope)
    programs, per_weight = len(tables.owners), tables.per_weight and slope is not None
    if programs:
        partial = slope.new_empty(programs) if slope is not None and not per_weight else None
        with torch.cuda.device_of(flat):
            kernels.soft_threshold_many_backward_kernel[(programs,)](
                tables.owners, tables.layout, tables.addresses, grads[0], flat, slope if per_weight else None,
                grad_flat, grad_raw, partial, MASKED=masked, BLOCK=BLOCK, ALIGNED=tables.aligned,
            )  # fmt: skip
            if partial is not None:
                kernels.soft_threshold_many_reduce_kernel[(len(tables.threshold_owners),)](
                    tables.threshold_owners, tables.layout, partial, slope, grad_raw, BLOCK=BLOCK
                )
    return grad_flat, grad_raw


class _Tables:
    """The tables that a launch reads about a list: each tensor's address, and the tensor of each program."""

    def __init__(self, xs: list[Tensor], thresholds: list[int]):
        views = [_rows(x, count) for x, count in zip(xs, thresholds, strict=True)]
        self.per_weight = any(per_weight for _, _, per_weight in views)
        programs = [rows * _blocks(cols) for rows, cols, _ in views]
        first_thresholds, total = _starts(thresholds, 16 if self.per_weight else 1)
        rows = zip(
            (cols for _, cols, _ in views), _flat_starts(xs)[0], _starts(programs)[0], first_thresholds, strict=True
        )
        self.addresses, self.layout, self.owners, self.threshold_owners, self.aligned = tables(
            xs, rows, sum(programs), 0 if self.per_weight else total
        )


def tables(
    xs: list[Tensor], rows: Iterable[tuple[int, int, int, int]], programs: int, thresholds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Return tables of the tensors' addresses and of `rows`, the tensor of each program and threshold, and the
    alignment.

    A tensor has a row: two numbers for the kernel, the first program and the first threshold. The alignment says
    whether all addresses allow loads of 16 bytes at once.
    """
    addresses, layout = tuple(x.data_ptr() for x in xs), tuple(number for row in rows for number in row)
    device = xs[0].device
    # A table is written on this stream: another stream may read it too early.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    # A CUDA graph writes its own: a cached one might be gone when the graph runs, and none is written until then.
    cached = not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    written, layout_tables = (f if cached else f.__wrapped__ for f in (_written, _layout_tables))
    owners = layout_tables(layout, programs, thresholds, device, stream)
    return written(addresses, device, stream), *owners, all(address % 16 == 0 for address in addresses)


@lru_cache(maxsize=64)
def _layout_tables(
    layout: tuple[int, ...], programs: int, thresholds: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table of the layout, and the index of the tensor that each program and each threshold belongs to."""
    table = _written.__wrapped__(layout, device, stream)
    _, _, first_programs, first_thresholds = table[: len(layout)].view(-1, 4).t().contiguous()
    owners, threshold_owners = (
        torch.searchsorted(firsts, torch.arange(count, device=device), right=True) - 1
        for firsts, count in ((first_programs, programs), (first_thresholds, thresholds))
    )
    return table, owners, threshold_owners


@lru_cache(maxsize=64)
def _written(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Write integers to the device as int64, without a copy from the host. The tensor has some room behind them."""
    from str_triton.kernels import soft_threshold as kernels

    table = torch.empty(-(-len(numbers) // NUMBERS) * NUMBERS, dtype=torch.int64, device=device)
    with torch.cuda.device_of(table):
        for start in range(0, len(numbers), NUMBERS):
            sent = [(1 << 62) + 32 * number + 8 for number in numbers[start : start + NUMBERS]]
            sent += [(1 << 62) + 8] * (NUMBERS - len(sent))
            kernels.soft_threshold_many_table_kernel[(1,)](table[start:], tuple(sent), num_warps=1)
    return table


@op("soft_threshold_many(Tensor[] xs, Tensor alpha, int[] thresholds) -> Tensor", _forward_many, _forward_many_triton)
def _(xs, alpha, thresholds):
    return xs[0].new_empty(_flat_starts(xs)[1])


@op(
    "soft_threshold_many_backward(Tensor[] grads, Tensor flat, Tensor? slope, int[] thresholds, bool masked)"
    " -> (Tensor, Tensor)",
    _backward_many,
    _backward_many_triton,
)
def _(grads, flat, slope, thresholds, masked):
    return flat.new_empty(flat.shape if masked else 0), flat.new_empty(0) if slope is None else torch.empty_like(slope)


@function
class _SoftThresholdMany(torch.autograd.Function):
    """The flat buffer, for the backward alone, and the results."""

    @staticmethod
    def forward(count, g, masked, *tensors):
        pairs = [_prepared(x, raw) for x, raw in zip(tensors[:count], tensors[count:], strict=True)]
        xs, raws = [x for x, _ in pairs], [raw for _, raw in pairs]
        alpha = threshold_function(g).value(_joined(xs, raws).to(compute_dtype(xs[0], raws[0])))
        flat = torch.ops.str_triton.soft_threshold_many(xs, alpha, [raw.numel() for raw in raws])
        return flat, *(_view(flat, x, start) for x, start in zip(xs, _flat_starts(xs)[0], strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        count, ctx.g, ctx.masked, *tensors = inputs
        flat, *outs = output
        ctx.mark_non_differentiable(flat)
        ctx.set_materialize_grads(False)  # `flat` would get a gradient, too.
        ctx.save_for_backward(flat, *tensors[count:])
        ctx.layouts = [(out.shape, out.stride()) for out in outs]

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *given):
        flat, *raws = ctx.saved_tensors
        grads = [
            flat.new_zeros(()).expand(shape) if grad is None else grad
            for grad, (shape, _) in zip(given, ctx.layouts, strict=True)
        ]
        grads = [_laid_out(grad, strides) for grad, (_, strides) in zip(grads, ctx.layouts, strict=True)]
        learned = any(ctx.needs_input_grad[3 + len(grads) :])
        grad_raws: Sequence[Tensor | None] = [None] * len(raws)
        thresholds, slope = [raw.numel() for raw in raws], None
        if learned:
            prepared = [_prepared(grad, raw)[1] for grad, raw in zip(grads, raws, strict=True)]
            slope = threshold_function(ctx.g).derivative(_joined(grads, prepared).to(compute_dtype(flat, raws[0])))
        if ctx.masked or learned:
            grad_flat, grad_raw = torch.ops.str_triton.soft_threshold_many_backward(
                grads, flat, slope, thresholds, ctx.masked
            )
        if learned:
            views = _threshold_views(grad_raw.to(raws[0].dtype), grads, thresholds)
            grad_raws = [view.reshape(raw.shape) for view, raw in zip(views, raws, strict=True)]
        if ctx.masked:
            grads = [_view(grad_flat, grad, start) for grad, start in zip(grads, _flat_starts(grads)[0], strict=True)]
        return None, None, None, *grads, *grad_raws


def _differentiable(xs: list[Tensor], alpha: Tensor, thresholds: list[int]) -> Tensor:
    """Compute the registered op, a function of alpha, with the masked gradient."""
    views = _threshold_views(alpha, xs, thresholds)
    _, *outs = _SoftThresholdMany.apply(len(xs), "identity", True, *xs, *views)
    return torch.cat([piece for out in outs for piece in (_flat(out), out.new_zeros(-out.numel() % 16))])


differentiable("soft_threshold_many", _differentiable)


def soft_threshold_many(
    xs: Sequence[Tensor], raw_thresholds: Sequence[Tensor], *, g: str = "sigmoid", gradient: str = "masked"
) -> list[Tensor]:
    """Apply `soft_threshold` to a list of tensors, of any length in one kernel launch on a GPU (backward: two).

    The thresholds take a few more launches, all together. Nothing waits for the GPU, and all of it may be captured in a
    CUDA graph (`torch.compile` with mode="reduce-overhead").

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
    if torch.compiler.is_compiling():  # It refuses a Function that gets one tensor twice, such as a shared threshold.
        tensors = [tensor.view_as(tensor) for tensor in tensors]
    strict, masked = is_strict_export(), gradient == "masked"
    if strict and not masked:
        tensors[: len(xs)] = [x.detach() for x in xs]
    call = _SoftThresholdMany.forward if strict else _SoftThresholdMany.apply
    _, *outs = call(len(xs), g, masked, *tensors)
    return [out + (x - x.detach()) for out, x in zip(outs, xs, strict=True)] if strict and not masked else outs
