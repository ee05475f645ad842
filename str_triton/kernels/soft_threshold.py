"""Soft threshold, forward and backward, for one tensor and for many tensors in one launch.

The kernels get the threshold alpha = g(s) and, in the backward, its slope g'(s), in the dtype of the arithmetic. torch
computes both, so that CPU and GPU prune the same weights. A tensor is read in memory order, as rows of `cols` elements.
A row has one alpha (with one row, so has the whole tensor), or every element has its own. A program processes BLOCK
elements of one row. So the number of programs, and every partial sum, is the same for a tensor alone and in a list. All
offsets are int64.
"""

import triton
import triton.language as tl


@triton.jit
def _place(block, cols, BLOCK: tl.constexpr):
    """Return the row of a block, the offsets of its elements, and a mask of those that exist."""
    # A grid has fewer than 2^31 programs, so the index of a block fits int32, which divides far faster; offsets do not.
    blocks_per_row = tl.cdiv(cols, BLOCK).to(tl.int32)
    row = (block // blocks_per_row).to(tl.int64)
    o_col = (block % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, row * cols + o_col, o_col < cols


@triton.jit
def _forward_block(p_x, p_alpha, p_out, block, cols, PER_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Write S of one block of BLOCK elements of a row. alpha is one value per row or one per weight."""
    row, offsets, mask = _place(block, cols, BLOCK)
    if PER_WEIGHT:
        alpha = tl.load(p_alpha + offsets, mask=mask, other=0)
    else:
        alpha = tl.load(p_alpha + row)
    x = tl.load(p_x + offsets, mask=mask, other=0).to(alpha.dtype)
    excess = tl.abs(x) - alpha
    # The comparison is false for NaN, which therefore comes out as NaN.
    out = tl.where(excess <= 0, 0, tl.where(x < 0, -excess, excess))
    tl.store(p_out + offsets, out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_block(
    p_grad, p_out, p_slope, p_grad_x, p_grad_raw, p_partial, block, cols,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of x and of raw thresholds per weight for one block, or the block's part of a row's sum."""
    # S = sign(x) relu(|x| - g(s)), so on the survivors (S != 0)  dS/dx = 1 and dS/ds = -g'(s) sign(x) = -g'(s) sign(S),
    # and both are 0 elsewhere. The sum over the weights that share s is left to the reduction, as is -g'(s).
    _, offsets, mask = _place(block, cols, BLOCK)
    grad = tl.load(p_grad + offsets, mask=mask, other=0)
    out = tl.load(p_out + offsets, mask=mask, other=0)
    if MASKED:
        tl.store(p_grad_x + offsets, tl.where(tl.abs(out) > 0, grad, 0), mask=mask)
    sign = tl.where(out > 0, 1, tl.where(out < 0, -1, 0))
    if p_slope is not None:
        slope = tl.load(p_slope + offsets, mask=mask, other=0)
        signed = grad.to(slope.dtype) * sign.to(slope.dtype)
        tl.store(p_grad_raw + offsets, -slope * signed, mask=mask)
    elif p_partial is not None:
        compute = p_partial.dtype.element_ty
        tl.store(p_partial + block, tl.sum(grad.to(compute) * sign.to(compute), axis=0))


# The next two functions compile their block twice. If rows are multiples of 16 elements, the compiler is told so
# (x // 16 * 16) and moves 16 bytes at once. The choice is made at run time and depends on the shape alone, so a tensor
# gets the same code, and the same order of summation, alone and in a list.
@triton.jit
def _forward(p_x, p_alpha, p_out, block, cols, PER_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Write S of one block."""
    if cols % 16 == 0:
        _forward_block(p_x, p_alpha, p_out, block, cols // 16 * 16, PER_WEIGHT, BLOCK)
    else:
        _forward_block(p_x, p_alpha, p_out, block, cols, PER_WEIGHT, BLOCK)


@triton.jit
def _backward(
    p_grad, p_out, p_slope, p_grad_x, p_grad_raw, p_partial, block, cols,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block."""
    if cols % 16 == 0:
        _backward_block(
            p_grad, p_out, p_slope, p_grad_x, p_grad_raw, p_partial, block, cols // 16 * 16, MASKED, BLOCK
        )  # fmt: skip
    else:
        _backward_block(p_grad, p_out, p_slope, p_grad_x, p_grad_raw, p_partial, block, cols, MASKED, BLOCK)


@triton.jit
def _reduce(p_partial, p_slope, p_grad_raw, row, cols, BLOCK: tl.constexpr):
    """Write the gradient of one row's raw threshold: the sum of the row's blocks times -g'(s)."""
    blocks_per_row = tl.cdiv(cols, BLOCK)
    p_row = p_partial + row * blocks_per_row
    total = tl.zeros([BLOCK], p_partial.dtype.element_ty)
    for start in range(0, blocks_per_row, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(p_row + i, mask=i < blocks_per_row, other=0)
    tl.store(p_grad_raw + row, -tl.load(p_slope + row) * tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["cols"])
def soft_threshold_kernel(p_x, p_alpha, p_out, cols: tl.int64, PER_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Write S = sign(x) relu(|x| - alpha) of one tensor."""
    _forward(p_x, p_alpha, p_out, tl.program_id(0), cols, PER_WEIGHT, BLOCK)


@triton.jit(do_not_specialize=["cols"])
def soft_threshold_backward_kernel(
    p_grad, p_out, p_slope, p_grad_x, p_grad_raw, p_partial, cols: tl.int64,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dL/dx of one tensor if MASKED, dL/ds per weight given p_slope, partial sums given p_partial."""
    _backward(p_grad, p_out, p_slope, p_grad_x, p_grad_raw, p_partial, tl.program_id(0), cols, MASKED, BLOCK)


@triton.jit(do_not_specialize=["cols"])
def soft_threshold_reduce_kernel(p_partial, p_slope, p_grad_raw, cols: tl.int64, BLOCK: tl.constexpr):
    """Write dL/ds of a row, from the partial sums of its blocks."""
    _reduce(p_partial, p_slope, p_grad_raw, tl.program_id(0), cols, BLOCK)


# One row per tensor in the layout of a list:
#   0 elements per row   1 first element in the flat buffer   2 first program   3 first threshold in its flat buffer
COLUMNS = tl.constexpr(4)


@triton.jit
def table_entry(p_owner, p_layout, p_addresses, like, ALIGNED: tl.constexpr):
    """Return the table entry of this program's tensor, its address as a pointer typed as `like`, and the block."""
    pid = tl.program_id(0)
    owner = tl.load(p_owner + pid)
    p_entry = p_layout + owner * COLUMNS
    pointer = tl.load(p_addresses + owner).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return p_entry, pointer, pid - tl.load(p_entry + 2).to(tl.int32)


@triton.jit
def soft_threshold_many_kernel(
    p_owner, p_layout, p_addresses, like_x, p_alpha, p_out,
    PER_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Do the same as `soft_threshold_kernel` for a list of tensors, found in a table."""
    p_entry, p_x, block = table_entry(p_owner, p_layout, p_addresses, like_x, ALIGNED)
    first = tl.load(p_entry + 3)
    # The launcher starts tensors, and thresholds that are one per weight, at multiples of 16 elements of their buffers.
    p_alpha += tl.multiple_of(first, 16) if PER_WEIGHT else first
    p_out += tl.multiple_of(tl.load(p_entry + 1), 16)
    _forward(p_x, p_alpha, p_out, block, tl.load(p_entry), PER_WEIGHT, BLOCK)


@triton.jit
def soft_threshold_many_backward_kernel(
    p_owner, p_layout, p_addresses, like_grad, p_out, p_slope, p_grad_x, p_grad_raw, p_partial,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Do the same as `soft_threshold_backward_kernel` for a list of tensors, found in a table."""
    p_entry, p_grad, block = table_entry(p_owner, p_layout, p_addresses, like_grad, ALIGNED)
    start = tl.multiple_of(tl.load(p_entry + 1), 16)
    if p_slope is not None:
        first = tl.multiple_of(tl.load(p_entry + 3), 16)
        p_slope, p_grad_raw = p_slope + first, p_grad_raw + first
    if p_partial is not None:
        p_partial += tl.load(p_entry + 2)
    _backward(
        p_grad, p_out + start, p_slope, p_grad_x + start, p_grad_raw, p_partial, block, tl.load(p_entry),
        MASKED, BLOCK,
    )  # fmt: skip


@triton.jit
def soft_threshold_many_reduce_kernel(p_owner, p_layout, p_partial, p_slope, p_grad_raw, BLOCK: tl.constexpr):
    """Do the same as `soft_threshold_reduce_kernel` for a list of tensors, found in a table."""
    pid = tl.program_id(0)
    p_entry = p_layout + tl.load(p_owner + pid) * COLUMNS
    first = tl.load(p_entry + 3)
    _reduce(
        p_partial + tl.load(p_entry + 2), p_slope + first, p_grad_raw + first, pid - first.to(tl.int32),
        tl.load(p_entry), BLOCK,
    )  # fmt: skip


@triton.jit
def soft_threshold_many_table_kernel(p_table, numbers):
    """Write a tuple of integers, which came as arguments of the launch, to memory.

    Unlike a copy from the host, this never waits, and a CUDA graph can record it. The launcher sends 2^62 + 32 n + 8
    for n, so that the compiler sees no number for which it would specialize the code.
    """
    for i in tl.static_range(len(numbers)):
        tl.store(p_table + i, (numbers[i] - 2**62) >> 5)
