"""Launches of all Triton kernels, for kernel_resources.py to compile: a name, and a call of the launcher on the CPU."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from str_triton.ops import low_rank_gpu, radix_select, singular_value_threshold, soft_threshold, soft_threshold_many
from str_triton.ops.low_rank_cell import CELLS
from str_triton.ops.low_rank_plan import saved_shape

Launch = tuple[str, Callable[[], Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def launches(all_variants: bool = True) -> list[Launch]:
    """Return the launches of all kernels, or of the variants that differ most: a name, and a call of the launcher."""
    return [
        *op_launches(all_variants),
        *low_rank_launches(every_size() if all_variants else REPRESENTATIVE),
    ]


def op_launches(all_variants: bool) -> list[Launch]:
    """Return the launches of all kernels but the recurrent loops."""
    return [
        *soft_threshold_launches(all_variants),
        *singular_value_threshold_launches(),
        *radix_select_launches(all_variants),
    ]


def soft_threshold_launches(all_variants: bool) -> Iterator[Launch]:
    for dtype, aligned in product(("float32", "bfloat16"), (True, False)):
        yield from _soft_threshold_launches(dtype, "row", aligned)
    yield from _soft_threshold_launches("float32", "weight", aligned=True)
    if all_variants:
        for dtype, granularity in product(("float16", "float64"), ("row", "weight")):
            yield from _soft_threshold_launches(dtype, granularity, aligned=True)
        yield from _soft_threshold_launches("float32", "weight", aligned=False)


def _soft_threshold_launches(dtype: str, granularity: str, aligned: bool) -> Iterator[Launch]:
    x = _tensor((2, 64), DTYPES[dtype], aligned)
    compute = torch.promote_types(x.dtype, torch.float32)
    alpha = _tensor((2, 1) if granularity == "row" else (2, 64), compute, aligned)
    out, flat, xs, thresholds = torch.zeros_like(x), x.new_zeros(256), [x, x], [alpha.numel()] * 2
    joined = torch.zeros(2 * alpha.numel(), dtype=compute)
    variant = f"{dtype}, per {granularity}, {'aligned' if aligned else 'misaligned'}"
    yield variant, partial(soft_threshold._forward_triton, x, alpha)
    yield variant, partial(soft_threshold_many._forward_many_triton, xs, joined, thresholds)
    for masked, learned in ((True, True), (False, True), (True, False)):
        gradient = f"{variant}, {'masked' if masked else 'straight-through'}{'' if learned else ', frozen'}"
        slopes = (alpha, joined) if learned else (None, None)
        yield gradient, partial(soft_threshold._backward_triton, x, out, slopes[0], masked)
        yield gradient, partial(soft_threshold_many._backward_many_triton, xs, flat, slopes[1], thresholds, masked)


def singular_value_threshold_launches() -> Iterator[Launch]:
    # The 16-bit matrices are decomposed in float32.
    for dtype, size in product(("float32", "float64"), (16, 256)):
        u, s, vh = (torch.zeros(shape, dtype=DTYPES[dtype]) for shape in ((2, size, size), (2, size), (2, size, size)))
        yield f"{dtype}, {size} x {size}", partial(singular_value_threshold._recombine_triton, u, s, vh, DTYPES[dtype])


def radix_select_launches(all_variants: bool) -> Iterator[Launch]:
    prefix, cut = torch.zeros((), dtype=torch.int64), torch.zeros(())
    for aligned in (True, False) if all_variants else (True,):
        values, name = [_tensor((100,), torch.float32, aligned)] * 2, "aligned" if aligned else "misaligned"
        for shift in (24, 16, 8, 0) if all_variants else (24, 0):
            yield f"shift {shift}, {name}", partial(radix_select._histogram_triton, values, [1, 1], prefix, shift)
        yield name, partial(radix_select._least_triton, values, cut)


Size = tuple[str, int, int, str, str]  # cell, hidden size, rank, dtype, precision
# A size of every kind: resident and streamed, no powers of two, no multiple of 16, float32 in each precision.
REPRESENTATIVE: list[Size] = [
    ("gru", 512, 32, "bfloat16", "tf32"), ("gru", 100, 10, "float32", "tf32"), ("lstm", 200, 16, "bfloat16", "tf32"),
    ("fastgrnn", 256, 16, "float32", "ieee"), ("mgu", 1000, 64, "bfloat16", "tf32"),
]  # fmt: skip


def every_size() -> list[Size]:
    """Return the sizes of the table: the representative ones, and each cell in more; a GRU in each precision."""
    kinds = ((100, "float32"), (256, "float32"), (100, "bfloat16"), (512, "bfloat16"), (1024, "bfloat16"))
    sizes = [(cell, hidden, hidden // 16, dtype, "tf32") for cell, (hidden, dtype) in product(CELLS, kinds)]
    others = [(200, 20, "bfloat16", "tf32"), (256, 16, "float64", "ieee")]
    others += [(256, 16, "float32", precision) for precision in ("ieee", "tf32x3")]
    return list(dict.fromkeys([*REPRESENTATIVE, *sizes, *(("gru", *other) for other in others)]))


def low_rank_launches(sizes: Iterable[Size]) -> Iterator[Launch]:
    for size in sizes:
        yield from low_rank_pair(*size)


def low_rank_pair(
    cell: str, hidden: int, rank: int, dtype: str, precision: str, lengths: Tensor | None = None, reverse: bool = False
) -> list[Launch]:
    """Return the forward and the backward launch of two steps of two sequences."""
    of, steps, batch = CELLS[cell], 2, 2

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=DTYPES[dtype])

    outputs, states = zeros(steps, batch, hidden), [zeros(batch, hidden) for _ in of.states]
    gates_x, p = zeros(steps, batch, of.gates * hidden), zeros(steps, batch, rank)
    saved = zeros(*saved_shape(of, steps, batch, hidden))
    scale = torch.zeros(of.scalars, dtype=torch.promote_types(DTYPES[dtype], torch.float32))
    weights = zeros(of.gates * hidden, rank), zeros(hidden, rank), zeros(of.bias_blocks * hidden), scale, states
    forward = (cell, gates_x, *weights, lengths, reverse, True, precision)
    backward = (cell, outputs, states, None, outputs, p, saved, *weights, lengths, reverse, precision)
    variant = f"{cell}, {hidden} x {rank}, {dtype}" + (f", {precision}" if dtype == "float32" else "")
    return [(variant, partial(low_rank_gpu.forward, *forward)), (variant, partial(low_rank_gpu.backward, *backward))]


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    numel = torch.Size(shape).numel()
    return torch.zeros(numel + 1, dtype=dtype)[0 if aligned else 1 :][:numel].view(shape)
