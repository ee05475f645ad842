"""Soft threshold with a learnable threshold: S = sign(x) relu(|x| - g(s)).

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020, equations 3 to 5.
Derivation of the gradients: docs/derivations.md. Kernels: kernels/soft_threshold.py.

The backward needs the output alone: on the survivors S != 0 and sign(S) = sign(x), elsewhere every derivative is 0.
The registered ops expect what `_SoftThreshold` hands them: x dense in memory, a raw threshold per weight and the
gradient laid out like x.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.thresholds import threshold_function

BLOCK = 1024  # Elements per program: the same for every shape, so that a list gives the same bits as a loop.
GRADIENTS = ("masked", "straight_through")


# ---- reference, and CPU implementation ----------------------------------------------------------------------------


def _forward(x: Tensor, raw: Tensor, g: str) -> Tensor:
    compute = _compute_dtype(x, raw)
    alpha = threshold_function(g).value(raw.to(compute))
    values = x.to(compute)
    if alpha.numel() == 1:
        alpha = alpha.reshape(())
        if alpha <= torch.finfo(compute).max:  # softshrink refuses inf and NaN; the formula has values there.
            return torch.nn.functional.softshrink(values, float(alpha)).to(x.dtype)
    out = torch.clamp(values, -alpha, alpha)
    return torch.sub(values, out, out=out).to(x.dtype)


def _backward(grad: Tensor, out: Tensor, raw: Tensor, g: str, masked: bool) -> tuple[Tensor, Tensor]:
    compute = _compute_dtype(out, raw)
    signed = torch.sign(out).to(compute)
    if masked:
        grad = torch.ops.aten.softshrink_backward(grad, out, 0.0)  # grad * 1{out != 0} in one pass.
    if raw.numel() == 1:
        total = torch.dot(_flat(grad).to(compute), _flat(signed))
    else:
        total = signed.mul_(grad)
        if raw.shape != out.shape:
            total = total.flatten(1).sum(1)
    grad_raw = -threshold_function(g).derivative(raw.to(compute)) * total.reshape(raw.shape)
    return grad if masked else grad.new_empty(0), grad_raw.to(raw.dtype)


def _forward_many(xs: list[Tensor], raws: list[Tensor], g: str) -> Tensor:
    starts, total = _flat_starts(xs)
    flat = xs[0].new_zeros(total)
    for x, raw, start in zip(xs, raws, starts, strict=True):
        _view(flat, x, start).copy_(_forward(x, raw, g))
    return flat


def _backward_many(
    grads: list[Tensor], flat: Tensor, raws: list[Tensor], g: str, masked: bool
) -> tuple[Tensor, Tensor]:
    starts, total = _flat_starts(grads)
    grad_flat = flat.new_zeros(total if masked else 0)
    grad_raws = []
    for grad, raw, start in zip(grads, raws, starts, strict=True):
        grad_x, grad_raw = _backward(grad, _view(flat, grad, start), raw, g, masked)
        grad_raws.append(_flat(grad_raw))
        if masked:
            _view(grad_flat, grad, start).copy_(grad_x)
    return grad_flat, torch.cat(grad_raws)


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


def _forward_many_triton(xs: list[Tensor], raws: list[Tensor], g: str) -> Tensor:
    """One launch for the whole list: each program looks its tensor up in a table."""
    from str_triton.kernels import soft_threshold as kernels

    flat = xs[0].new_zeros(_flat_starts(xs)[1])
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
    grad_flat = torch.zeros_like(flat) if masked else flat.new_empty(0)
    grad_raw = raws[0].new_zeros(flat.numel() if plan.per_weight else sum(raw.numel() for raw in raws))
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
        self.per_weight = views[0][2]
        self.compute = _triton_dtype(xs[0], raws[0])
        # A vector load needs 16-byte addresses: of the tensors themselves, and of each row within them.
        self.aligned = all(x.data_ptr() % 16 == 0 for x in xs) and (
            not self.per_weight or all(raw.data_ptr() % 16 == 0 for raw in raws)
        )
        device = xs[0].device
        self.owners = _owners(tuple(programs), device)
        self.raw_owners = _owners(tuple(raw_counts), device)
        self.table = _to_device(
            tuple(
                number
                for x, raw, (_, cols, _), start, first, first_raw in zip(
                    xs, raws, views, self.starts, _exclusive_sums(programs), _exclusive_sums(raw_counts), strict=True
                )
                for number in (x.data_ptr(), raw.data_ptr(), cols, start, first, first_raw)
            ),
            device,
        )


@lru_cache(maxsize=64)
def _owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """counts[0] zeros, counts[1] ones, ...: the tensor that each program serves."""
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return owners.to(device)


@lru_cache(maxsize=64)
def _to_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Parameters keep their addresses, so that a training loop copies its table once."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


# ---- memory layout ------------------------------------------------------------------------------------------------


def _compute_dtype(x: Tensor, raw: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, raw.dtype), torch.float32)


def _triton_dtype(x: Tensor, raw: Tensor) -> object:
    import triton.language as tl

    return tl.float64 if _compute_dtype(x, raw) == torch.float64 else tl.float32


def _blocks(cols: int) -> int:
    return -(-cols // BLOCK)


def _rows(x: Tensor, raw: Tensor) -> tuple[int, int, bool]:
    """x in memory order as (rows, elements per row), and whether every weight has a threshold of its own."""
    if raw.numel() == 1:
        return 1, x.numel(), False
    if raw.shape == x.shape:
        return 1, x.numel(), True
    return x.shape[0], x.numel() // max(x.shape[0], 1), False


def _exclusive_sums(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))[:-1]


def _flat_starts(xs: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in the flat buffer (multiples of 16 elements), and the buffer's length."""
    padded = [-(-x.numel() // 16) * 16 for x in xs]
    return _exclusive_sums(padded), sum(padded)


def _flat(x: Tensor) -> Tensor:
    """A dense tensor as one dimension, in memory order."""
    return x.as_strided((x.numel(),), (1,))


def _view(flat: Tensor, like: Tensor, start: int) -> Tensor:
    return flat.narrow(0, start, like.numel()).as_strided(like.shape, like.stride())


def _laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    return x if x.stride() == tuple(strides) else x.new_empty_strided(x.shape, strides).copy_(x)


def _is_dense(x: Tensor, by_row: bool) -> bool:
    """No gaps and no overlaps in memory; with `by_row` also dimension 0 outermost."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return not by_row or x.shape[0] == 1 or x.stride(0) * x.shape[0] == x.numel()


def _prepared(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """x and raw_threshold as the registered ops expect them; copies only what does not fit."""
    if raw.numel() == 1:
        return (x if x.is_contiguous() or _is_dense(x, by_row=False) else x.contiguous()), raw.contiguous()
    if raw.shape == x.shape:
        x = x if _is_dense(x, by_row=False) else x.contiguous()
        return x, _laid_out(raw, x.stride())
    return (x if _is_dense(x, by_row=True) else x.contiguous()), raw.contiguous()


# ---- registration -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("str_triton", "FRAGMENT")
_LIBRARY.define("soft_threshold(Tensor x, Tensor raw, str g) -> Tensor")
_LIBRARY.define("soft_threshold_backward(Tensor grad, Tensor out, Tensor raw, str g, bool masked) -> (Tensor, Tensor)")
_LIBRARY.define("soft_threshold_many(Tensor[] xs, Tensor[] raws, str g) -> Tensor")
_LIBRARY.define(
    "soft_threshold_many_backward(Tensor[] grads, Tensor flat, Tensor[] raws, str g, bool masked) -> (Tensor, Tensor)"
)
for _name, _cpu, _triton in (
    ("soft_threshold", _forward, _forward_triton),
    ("soft_threshold_backward", _backward, _backward_triton),
    ("soft_threshold_many", _forward_many, _forward_many_triton),
    ("soft_threshold_many_backward", _backward_many, _backward_many_triton),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _triton, "CUDA")


@torch.library.register_fake("str_triton::soft_threshold")
def _(x, raw, g):
    return torch.empty_like(x)


@torch.library.register_fake("str_triton::soft_threshold_backward")
def _(grad, out, raw, g, masked):
    return torch.empty_like(out) if masked else out.new_empty(0), torch.empty_like(raw)


@torch.library.register_fake("str_triton::soft_threshold_many")
def _(xs, raws, g):
    return xs[0].new_empty(_flat_starts(xs)[1])


@torch.library.register_fake("str_triton::soft_threshold_many_backward")
def _(grads, flat, raws, g, masked):
    return flat.new_empty(flat.shape if masked else 0), raws[0].new_empty(sum(raw.numel() for raw in raws))


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


# ---- public functions ---------------------------------------------------------------------------------------------


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
            shape, one per weight. A floating-point dtype, on x's device.
        g: "sigmoid", "exp", "softplus", or "identity" (the threshold itself; a negative value acts as 0).
        gradient: "masked" or "straight_through".

    Returns:
        Tensor of x's shape, dtype and (if x is dense in memory) strides. Differentiable once.

    Raises:
        TypeError: x or raw_threshold is not a floating-point tensor.
        ValueError: unknown g or gradient, a raw_threshold of another shape, or on another device.

    Source: Kusupati et al., ICML 2020 (arXiv 2002.03231), equations 3 to 5.
    """
    _check_options(g, gradient)
    _check_pair(x, raw_threshold)
    return _SoftThreshold.apply(x, raw_threshold, g, gradient == "masked")


def soft_threshold_many(
    xs: Sequence[Tensor], raw_thresholds: Sequence[Tensor], *, g: str = "sigmoid", gradient: str = "masked"
) -> list[Tensor]:
    """`soft_threshold` for a list of tensors, in one kernel launch on a GPU (two in the backward), whatever its length.

    The results, and their gradients, have the same bits as those of a loop over `soft_threshold`.

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
    if len({_per_weight(x, raw) for x, raw in zip(xs, raws, strict=True)}) > 1:
        raise ValueError("raw_thresholds must be one per weight for all of xs or for none of them")
    tensors = xs + raws
    if torch.compiler.is_compiling():  # It refuses a Function that gets one tensor twice, as a shared threshold.
        tensors = [tensor.view_as(tensor) for tensor in tensors]
    return list(_SoftThresholdMany.apply(len(xs), g, gradient == "masked", *tensors))


def _per_weight(x: Tensor, raw: Tensor) -> bool:
    return raw.numel() != 1 and raw.shape == x.shape


def _check_options(g: str, gradient: str) -> None:
    threshold_function(g)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be 'masked' or 'straight_through', got {gradient!r}")


def _check_pair(x: Tensor, raw: Tensor) -> None:
    for name, tensor in (("x", x), ("raw_threshold", raw)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if raw.device != x.device:
        raise ValueError(f"raw_threshold is on {raw.device}, x on {x.device}: move them to one device")
    if raw.numel() != 1 and raw.shape != x.shape and raw.shape != (*x.shape[:1], *[1] * (x.dim() - 1)):
        rows = f"({', '.join(map(str, (*x.shape[:1], *[1] * (x.dim() - 1))))})"
        raise ValueError(
            f"raw_threshold of shape {tuple(raw.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"give one element, {rows} for one per row, or x's shape for one per weight"
        )
