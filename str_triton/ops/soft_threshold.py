"""Soft threshold with a learnable threshold: S = sign(x) relu(|x| - g(s)).

Derivation of the gradients: docs/derivations.md. Kernels: kernels/soft_threshold.py.

The threshold alpha = g(s) and its slope g'(s) come from ops/thresholds.py: the ops and kernels get numbers, the same on
every device. The backward needs the output alone: on the survivors S != 0 and sign(S) = sign(x), elsewhere every
derivative is 0. The registered ops expect what `_SoftThreshold` hands them: x dense in memory; alpha and slope in the
dtype of the arithmetic, laid out like x if there is one per weight; the gradient laid out like x; no slope (None) where
s needs no gradient.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.layout import BLOCK, _blocks, _flat, _laid_out, _prepared, _rows
from str_triton.ops.registration import differentiable, function, is_strict_export, op
from str_triton.ops.shards import is_sharded, threshold_shards
from str_triton.ops.tensors import check_tensors, compute_dtype
from str_triton.ops.thresholds import threshold_function

PIECE = 1 << 19  # Elements at a time on the CPU: few enough for its caches, enough for all of its threads.
GRADIENTS = ("masked", "straight_through")


def _forward(x: Tensor, alpha: Tensor) -> Tensor:
    values = x.to(alpha.dtype)
    if alpha.numel() == 1:
        alpha = alpha.reshape(())
        if math.isfinite(alpha):  # softshrink refuses inf and NaN; the formula has values there.
            return torch.nn.functional.softshrink(values, float(alpha)).to(x.dtype)
    out = torch.clamp(values, -alpha, alpha)
    return torch.sub(values, out, out=out).to(x.dtype)


def _backward(grad: Tensor, out: Tensor, slope: Tensor | None, masked: bool) -> tuple[Tensor, Tensor]:
    if slope is None:
        return _mask_into(torch.empty_like(out), grad, out), out.new_empty(0)
    if slope.numel() == 1:
        grad_x, total = _backward_in_pieces(grad, out, slope.dtype, masked)
    else:
        signs = torch.sign(out)  # 0 where the element is pruned.
        total = grad.to(slope.dtype) * signs
        if slope.shape != out.shape:
            total = total.flatten(1).sum(1)
        grad_x = _mask_into(signs, grad, out) if masked else grad.new_empty(0)
    return grad_x, -slope * total.reshape(slope.shape)


def _backward_in_pieces(grad: Tensor, out: Tensor, compute: torch.dtype, masked: bool) -> tuple[Tensor, Tensor]:
    """Return grad 1{out != 0} and sum(grad sign(out)), with little other memory: touching fresh memory costs a pass."""
    grad_x = torch.empty_like(out) if masked else out.new_empty(0)
    scratch = out.new_empty(0 if masked else min(PIECE, out.numel()))
    total = out.new_zeros((), dtype=compute)
    for start in range(0, out.numel(), PIECE):
        grad_piece, out_piece, grad_x_piece = (_flat(tensor)[start : start + PIECE] for tensor in (grad, out, grad_x))
        signs = torch.sign(out_piece, out=grad_x_piece if masked else scratch[: len(out_piece)])
        total += torch.dot(grad_piece.to(compute), signs.to(compute))
        if masked:
            _mask_into(signs, grad_piece, out_piece)
    return grad_x, total


def _mask_into(result: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """Write grad 1{out != 0} in one pass."""
    return torch.ops.aten.softshrink_backward.grad_input(grad, out, 0.0, grad_input=result)


def _forward_triton(x: Tensor, alpha: Tensor) -> Tensor:
    """Launch once: a program per BLOCK elements of a row."""
    from str_triton.kernels import soft_threshold as kernels

    out = torch.empty_like(x)
    rows, cols, per_weight = _rows(x, alpha.numel())
    if x.numel():
        with torch.cuda.device_of(x):
            kernels.soft_threshold_kernel[(rows * _blocks(cols),)](
                x, alpha, out, cols, PER_WEIGHT=per_weight, BLOCK=BLOCK
            )
    return out


def _backward_triton(grad: Tensor, out: Tensor, slope: Tensor | None, masked: bool) -> tuple[Tensor, Tensor]:
    """Launch once, and once more to sum the partials of each threshold in a fixed order."""
    from str_triton.kernels import soft_threshold as kernels

    rows, cols, per_weight = _rows(out, 1 if slope is None else slope.numel())
    grad_x = torch.empty_like(out) if masked else out.new_empty(0)
    grad_raw = out.new_empty(0) if slope is None else (torch.empty_like if out.numel() else torch.zeros_like)(slope)
    if out.numel():
        partial = slope.new_empty(rows * _blocks(cols)) if slope is not None and not per_weight else None
        with torch.cuda.device_of(out):
            kernels.soft_threshold_backward_kernel[(rows * _blocks(cols),)](
                grad, out, slope if per_weight else None, grad_x, grad_raw, partial, cols, MASKED=masked, BLOCK=BLOCK
            )
            if partial is not None:
                kernels.soft_threshold_reduce_kernel[(rows,)](partial, slope, grad_raw, cols, BLOCK=BLOCK)
    return grad_x, grad_raw


@op("soft_threshold(Tensor x, Tensor alpha) -> Tensor", _forward, _forward_triton)
def _(x, alpha):
    return torch.empty_like(x)


@op(
    "soft_threshold_backward(Tensor grad, Tensor out, Tensor? slope, bool masked) -> (Tensor, Tensor)",
    _backward,
    _backward_triton,
)
def _(grad, out, slope, masked):
    grad_x = torch.empty_like(out) if masked else out.new_empty(0)
    return grad_x, out.new_empty(0) if slope is None else torch.empty_like(slope)


@function
class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(x, raw, g, masked, learned):
        x, raw = _prepared(x, raw)
        return torch.ops.str_triton.soft_threshold(x, threshold_function(g).value(raw.to(compute_dtype(x, raw))))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, raw, ctx.g, ctx.masked, ctx.learned = inputs
        ctx.save_for_backward(output, raw)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, raw = ctx.saved_tensors
        learned = ctx.learned and ctx.needs_input_grad[1]
        if not ctx.masked and not learned:
            return grad, None, None, None, None
        slope = None
        if learned:
            slope = threshold_function(ctx.g).derivative(_prepared(out, raw)[1].to(compute_dtype(out, raw)))
        grad_x, grad_raw = torch.ops.str_triton.soft_threshold_backward(
            _laid_out(grad, out.stride()), out, slope, ctx.masked
        )
        return grad_x if ctx.masked else grad, grad_raw.to(raw.dtype) if learned else None, None, None, None


# The registered op is a function of alpha, with the masked gradient.
differentiable("soft_threshold", lambda x, alpha: _SoftThreshold.apply(x, alpha, "identity", True, True))


def soft_threshold(
    x: Tensor, raw_threshold: Tensor, *, g: str = "sigmoid", gradient: str = "masked", learn_threshold: bool = True
) -> Tensor:
    """Compute S = sign(x) relu(|x| - g(s)) with a learnable raw threshold s.

    With grad = dL/dS the gradients are

        dL/dx = grad 1{S != 0}   (masked)
        dL/dx = grad             (straight_through)
        dL/ds = -g'(s) sum(grad sign(x) 1{S != 0})

    The masked gradient is the paper's. The sum is over the elements that share s.

    At a tie |x| = g(s) the element counts as pruned (derivative 0). NaN in x or s gives NaN; infinities give the
    formula's values. Arithmetic is float64 if x or s is, else float32. The same inputs give the same bits. g(s) is
    computed in float64 and rounded, so that CPU and GPU prune the same weights.

    Args:
        x: any shape, float16, bfloat16, float32 or float64; any memory format. A DTensor too: each process thresholds
            its shard, with the elements of raw_threshold that it needs.
        raw_threshold: s. One element of any shape; or shape (x.shape[0], 1, ..., 1), one per row or filter; or x's
            shape, one per weight. Any of these dtypes, on x's device.
        g: "sigmoid", "exp", "softplus", or "identity" (the threshold itself; a negative value acts as 0).
        gradient: "masked" or "straight_through".
        learn_threshold: False leaves out dL/ds, as `raw_threshold.requires_grad=False` does, but keeps raw_threshold in
            the autograd graph. DistributedDataParallel waits at every step for each parameter that required a gradient
            when the model was wrapped.

    Returns:
        Tensor of x's shape and dtype; of x's strides too, unless x has gaps or overlaps in memory, or thresholds are
        per row and the rows do not lie one after the other. Differentiable once, by autograd or `torch.func.grad`;
        `torch.func.vmap` loops over the batch.

    Raises:
        TypeError: x or raw_threshold is not a tensor of one of these dtypes.
        ValueError: unknown g or gradient, a raw_threshold of another shape, or on another device.

    Source: Kusupati et al., ICML 2020 (arXiv 2002.03231), equations 3 to 5.
    """
    _check_options(g, gradient)
    _check_pair(x, raw_threshold)

    def threshold(x: Tensor, raw: Tensor) -> Tensor:
        masked = gradient == "masked"
        if is_strict_export():
            raw = raw if learn_threshold else raw.detach()
            out = _SoftThreshold.forward(x if masked else x.detach(), raw, g, masked, learn_threshold)
            return out if masked else out + (x - x.detach())  # zeros with the gradient of x
        return _SoftThreshold.apply(x, raw, g, masked, learn_threshold)

    if is_sharded(x) or is_sharded(raw_threshold):
        return threshold_shards(threshold, x, raw_threshold)
    return threshold(x, raw_threshold)


def _check_options(g: str, gradient: str) -> None:
    threshold_function(g)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be 'masked' or 'straight_through', got {gradient!r}")


def _check_pair(x: Tensor, raw: Tensor) -> None:
    check_tensors({"x": x, "raw_threshold": raw})
    if raw.numel() != 1 and raw.shape != x.shape and raw.shape != (*x.shape[:1], *[1] * (x.dim() - 1)):
        rows = f"({', '.join(map(str, (*x.shape[:1], *[1] * (x.dim() - 1))))})"
        raise ValueError(
            f"raw_threshold of shape {tuple(raw.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"give one element, {rows} for one per row, or x's shape for one per weight"
        )
