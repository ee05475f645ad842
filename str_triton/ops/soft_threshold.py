"""Soft threshold with a learnable threshold: S = sign(x) relu(|x| - g(s)).

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020, equations 3 to 5.
Derivation of the gradients: docs/derivations.md. Kernels: kernels/soft_threshold.py.

The backward needs the output alone: on the survivors S != 0 and sign(S) = sign(x), elsewhere every derivative is 0.
The registered ops expect what `_SoftThreshold` hands them: x dense in memory, a raw threshold per weight and the
gradient laid out like x.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.thresholds import threshold_function

BLOCK = 1024  # Elements per program: the same for every shape, so that a list gives the same bits as a loop.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PIECE = 1 << 19  # Elements at a time on the CPU: few enough for its caches, enough for all of its threads.
GRADIENTS = ("masked", "straight_through")


# ---- reference, and CPU implementation ----------------------------------------------------------------------------


def _forward(x: Tensor, raw: Tensor, g: str) -> Tensor:
    compute = _compute_dtype(x, raw)
    alpha = threshold_function(g).value(raw.to(compute))
    values = x.to(compute)
    if alpha.numel() == 1:
        alpha = alpha.reshape(())
        if math.isfinite(alpha):  # softshrink refuses inf and NaN; the formula has values there.
            return torch.nn.functional.softshrink(values, float(alpha)).to(x.dtype)
    out = torch.clamp(values, -alpha, alpha)
    return torch.sub(values, out, out=out).to(x.dtype)


def _backward(grad: Tensor, out: Tensor, raw: Tensor, g: str, masked: bool) -> tuple[Tensor, Tensor]:
    compute = _compute_dtype(out, raw)
    if raw.numel() == 1:
        grad_x, total = _backward_in_pieces(grad, out, compute, masked)
    else:
        signs = torch.sign(out)  # 0 where the element is pruned.
        total = grad.to(compute) * signs
        if raw.shape != out.shape:
            total = total.flatten(1).sum(1)
        grad_x = _mask_into(signs, grad, out) if masked else grad.new_empty(0)
    grad_raw = -threshold_function(g).derivative(raw.to(compute)) * total.reshape(raw.shape)
    return grad_x, grad_raw.to(raw.dtype)


def _backward_in_pieces(grad: Tensor, out: Tensor, compute: torch.dtype, masked: bool) -> tuple[Tensor, Tensor]:
    """grad 1{out != 0} and sum(grad sign(out)), with next to no other memory: to touch fresh memory costs a pass."""
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
    """grad 1{out != 0} in one pass."""
    return torch.ops.aten.softshrink_backward.grad_input(grad, out, 0.0, grad_input=result)


# ---- Triton implementation ----------------------------------------------------------------------------------------


def _forward_triton(x: Tensor, raw: Tensor, g: str) -> Tensor:
    """One launch: a program per BLOCK elements of a row."""
    from str_triton.kernels import soft_threshold as kernels

    out = torch.empty_like(x)
    rows, cols, per_weight = _rows(x, raw)
    if x.numel():
        with torch.cuda.device_of(x):
            kernels.soft_threshold_kernel[(rows * _blocks(cols),)](
                x, raw, out, cols, G=g, PER_WEIGHT=per_weight, COMPUTE=_triton_dtype(x, raw), BLOCK=BLOCK
            )
    return out


def _backward_triton(grad: Tensor, out: Tensor, raw: Tensor, g: str, masked: bool) -> tuple[Tensor, Tensor]:
    """One launch, and one that sums the partials of each raw threshold in a fixed order."""
    from str_triton.kernels import soft_threshold as kernels

    rows, cols, per_weight = _rows(out, raw)
    grad_x = torch.empty_like(out) if masked else out.new_empty(0)
    grad_raw = torch.empty_like(raw) if out.numel() else torch.zeros_like(raw)
    if out.numel():
        partial = out.new_empty(0 if per_weight else rows * _blocks(cols), dtype=_compute_dtype(out, raw))
        options = {"G": g, "COMPUTE": _triton_dtype(out, raw), "BLOCK": BLOCK}
        with torch.cuda.device_of(out):
            kernels.soft_threshold_backward_kernel[(rows * _blocks(cols),)](
                grad, out, raw, grad_x, grad_raw, partial, cols, MASKED=masked, PER_WEIGHT=per_weight, **options
            )
            if not per_weight:
                kernels.soft_threshold_reduce_kernel[(rows,)](partial, raw, grad_raw, cols, **options)
    return grad_x, grad_raw


# ---- memory layout ------------------------------------------------------------------------------------------------


def _compute_dtype(x: Tensor, raw: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, raw.dtype), torch.float32)


def _triton_dtype(x: Tensor, raw: Tensor) -> object:
    import triton.language as tl

    return tl.float64 if _compute_dtype(x, raw) == torch.float64 else tl.float32


def _blocks(cols: int) -> int:
    return -(-cols // BLOCK)


def _per_weight(x: Tensor, raw: Tensor) -> bool:
    return raw.numel() != 1 and raw.shape == x.shape


def _rows(x: Tensor, raw: Tensor) -> tuple[int, int, bool]:
    """x in memory order as (rows, elements per row), and whether every weight has a threshold of its own."""
    if raw.numel() == 1 or _per_weight(x, raw):
        return 1, x.numel(), _per_weight(x, raw)
    return x.shape[0], x.numel() // max(x.shape[0], 1), False


def _flat(x: Tensor) -> Tensor:
    """A dense tensor as one dimension, in memory order."""
    return x.as_strided((x.numel(),), (1,))


def _laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    return x if x.stride() == tuple(strides) else x.new_empty_strided(x.shape, strides).copy_(x)


def _is_dense(x: Tensor, by_row: bool) -> bool:
    """No gaps and no overlaps in memory; with `by_row` also dimension 0 outermost."""
    if x.is_contiguous():
        return True
    # empty_like keeps the strides of a dense tensor, and of no other.
    is_dense = torch.empty_like(x, device="meta").stride() == x.stride()
    return is_dense and not (by_row and x.shape[0] != 1 and x.stride(0) * x.shape[0] != x.numel())


def _prepared(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """x and raw_threshold as the registered ops expect them; copies only what does not fit."""
    per_weight = _per_weight(x, raw)
    x = x if _is_dense(x, by_row=raw.numel() != 1 and not per_weight) else x.contiguous()
    return x, _laid_out(raw, x.stride()) if per_weight else raw.contiguous()


# ---- registration -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("str_triton", "FRAGMENT")
_LIBRARY.define("soft_threshold(Tensor x, Tensor raw, str g) -> Tensor")
_LIBRARY.define("soft_threshold_backward(Tensor grad, Tensor out, Tensor raw, str g, bool masked) -> (Tensor, Tensor)")
_LIBRARY.impl("soft_threshold", _forward, "CPU")
_LIBRARY.impl("soft_threshold", _forward_triton, "CUDA")
_LIBRARY.impl("soft_threshold_backward", _backward, "CPU")
_LIBRARY.impl("soft_threshold_backward", _backward_triton, "CUDA")


@torch.library.register_fake("str_triton::soft_threshold")
def _(x, raw, g):
    return torch.empty_like(x)


@torch.library.register_fake("str_triton::soft_threshold_backward")
def _(grad, out, raw, g, masked):
    return torch.empty_like(out) if masked else out.new_empty(0), torch.empty_like(raw)


# ---- autograd -----------------------------------------------------------------------------------------------------


class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, raw, g, masked):
        x, raw = _prepared(x, raw)
        out = torch.ops.str_triton.soft_threshold(x, raw, g)
        ctx.save_for_backward(out, raw)
        ctx.g, ctx.masked = g, masked
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, raw = ctx.saved_tensors
        if not ctx.masked and not ctx.needs_input_grad[1]:
            return grad, None, None, None
        grad = _laid_out(grad, out.stride())
        grad_x, grad_raw = torch.ops.str_triton.soft_threshold_backward(grad, out, raw, ctx.g, ctx.masked)
        return grad_x if ctx.masked else grad, grad_raw, None, None


# ---- public function ----------------------------------------------------------------------------------------------


def soft_threshold(x: Tensor, raw_threshold: Tensor, *, g: str = "sigmoid", gradient: str = "masked") -> Tensor:
    """S = sign(x) relu(|x| - g(s)) with a learnable raw threshold s.

    With grad = dL/dS the gradients are

        dL/dx = grad 1{S != 0}   ("masked", the paper's)    or    grad   ("straight_through")
        dL/ds = -g'(s) sum(grad sign(x) 1{S != 0})          over the elements that share s, in both cases

    At a tie |x| = g(s) the element counts as pruned (derivative 0). NaN in x or s gives NaN; infinities give the
    formula's values. Arithmetic is float64 if x or s is, else float32. The same inputs give the same bits.

    Args:
        x: any shape, float16, bfloat16, float32 or float64; any memory format.
        raw_threshold: s. One element of any shape; or shape (x.shape[0], 1, ..., 1), one per row or filter; or x's
            shape, one per weight. Any of these dtypes, on x's device.
        g: "sigmoid", "exp", "softplus", or "identity" (the threshold itself; a negative value acts as 0).
        gradient: "masked" or "straight_through".

    Returns:
        Tensor of x's shape and dtype; of x's strides too, unless x has gaps or overlaps in memory, or thresholds are
        per row and the rows do not lie one after the other. Differentiable once.

    Raises:
        TypeError: x or raw_threshold is not a tensor of one of these dtypes.
        ValueError: unknown g or gradient, a raw_threshold of another shape, or on another device.

    Source: Kusupati et al., ICML 2020 (arXiv 2002.03231), equations 3 to 5.
    """
    _check_options(g, gradient)
    _check_pair(x, raw_threshold)
    return _SoftThreshold.apply(x, raw_threshold, g, gradient == "masked")


def _check_options(g: str, gradient: str) -> None:
    threshold_function(g)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be 'masked' or 'straight_through', got {gradient!r}")


def _check_pair(x: Tensor, raw: Tensor) -> None:
    for name, tensor in (("x", x), ("raw_threshold", raw)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of float16, bfloat16, float32 or float64, got {kind}")
    if raw.device != x.device:
        raise ValueError(f"raw_threshold is on {raw.device}, x on {x.device}: move them to one device")
    if raw.numel() != 1 and raw.shape != x.shape and raw.shape != (*x.shape[:1], *[1] * (x.dim() - 1)):
        rows = f"({', '.join(map(str, (*x.shape[:1], *[1] * (x.dim() - 1))))})"
        raise ValueError(
            f"raw_threshold of shape {tuple(raw.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"give one element, {rows} for one per row, or x's shape for one per weight"
        )
