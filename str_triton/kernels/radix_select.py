"""Two passes over the values of a list of tensors, for a radix selection: a histogram, and the least value above a cut.

A program processes SPAN elements of one tensor, which it finds in a table (kernels/soft_threshold.py). Each program
writes its own row of the result. There are no atomics, so the same inputs give the same bits.
"""

import triton
import triton.language as tl

from str_triton.kernels.soft_threshold import table_entry

BINS = tl.constexpr(256)


@triton.jit
def radix_select_histogram_kernel(
    p_owner, p_layout, p_addresses, like, p_prefix, p_partial,
    SHIFT: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write, for each digit, the cost of the elements below inf with this digit at SHIFT and the prefix above it."""
    p_entry, p_values, span = table_entry(p_owner, p_layout, p_addresses, like, ALIGNED)
    numel, cost, prefix = tl.load(p_entry), tl.load(p_entry + 1), tl.load(p_prefix).to(tl.uint32)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, SPAN, BLOCK):
        i = span.to(tl.int64) * SPAN + start + tl.arange(0, BLOCK)
        value = tl.load(p_values + i, mask=i < numel, other=0)
        # The order of the keys is that of the values: of negative numbers all bits change, of others the sign.
        bits = tl.where(value == 0, 0, value.to(tl.int32, bitcast=True))
        key = (bits ^ ((bits >> 31) | (-(2**31)))).to(tl.uint32, bitcast=True)
        mask = (i < numel) & (value < float("inf"))
        if SHIFT < 24:
            mask &= (key >> (SHIFT + 8)) == prefix
        counts += tl.histogram(((key >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=mask)
    tl.store(p_partial + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), counts.to(tl.int64) * cost)


@triton.jit
def radix_select_least_kernel(
    p_owner, p_layout, p_addresses, like, p_cut, p_partial,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write the least of the program's elements above the cut, or inf if there is none."""
    p_entry, p_values, span = table_entry(p_owner, p_layout, p_addresses, like, ALIGNED)
    numel, cut = tl.load(p_entry), tl.load(p_cut)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, SPAN, BLOCK):
        i = span.to(tl.int64) * SPAN + start + tl.arange(0, BLOCK)
        value = tl.load(p_values + i, mask=i < numel, other=float("inf"))
        least = tl.minimum(least, tl.where(value > cut, value, float("inf")))
    tl.store(p_partial + tl.program_id(0), tl.min(least, axis=0))
