"""Soft threshold, forward and backward, for one tensor and for many tensors in one launch.

A tensor is seen in memory order as rows of `cols` elements; a row shares one raw threshold (one row: a single
threshold for the whole tensor), or every element has its own (PER_WEIGHT). A program takes BLOCK elements of one
row, so the number of programs, and with it every partial sum, is the same whether a tensor comes alone or in a list.
All offsets are int64.
"""

import triton
import triton.language as tl


@triton.jit
def threshold(raw, G: tl.constexpr):
    """alpha = g(raw)."""
    if G == "sigmoid":
        return 1 / (1 + tl.exp(-raw))
    elif G == "exp":
        return tl.exp(raw)
    elif G == "softplus":
        e = tl.exp(-tl.abs(raw))
        u = 1 + e
        # log1p(e) without libdevice: the rounding error of 1 + e cancels in the quotient.
        log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1, u - 1)))
        return tl.where(raw > 0, raw, 0) + log1p
    else:
        return tl.where(raw < 0, 0, raw)


@triton.jit
def threshold_derivative(raw, G: tl.constexpr):
    """g'(raw)."""
    if G == "sigmoid":
        alpha = 1 / (1 + tl.exp(-raw))
        return alpha * (1 - alpha)
    elif G == "exp":
        return tl.exp(raw)
    elif G == "softplus":
        return 1 / (1 + tl.exp(-raw))
    else:
        return tl.where(raw >= 0, 1.0, 0.0).to(raw.dtype)


@triton.jit
def _place(block, cols, BLOCK: tl.constexpr):
    """The row of a block, the offsets of its elements, and which of them exist."""
    # A grid has fewer than 2^31 programs, so the index of a block fits int32, which divides far faster; offsets do not.
    blocks_per_row = tl.cdiv(cols, BLOCK).to(tl.int32)
    row = (block // blocks_per_row).to(tl.int64)
    o_col = (block % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, row * cols + o_col, o_col < cols


@triton.jit
def _forward_block(
    p_x, p_raw, p_out, block, cols,
    G: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offsets, mask = _place(block, cols, BLOCK)
    x = tl.load(p_x + offsets, mask=mask, other=0).to(COMPUTE)
    if PER_WEIGHT:
        raw = tl.load(p_raw + offsets, mask=mask, other=0).to(COMPUTE)
    else:
        raw = tl.load(p_raw + row).to(COMPUTE)
    excess = tl.abs(x) - threshold(raw, G)
    # The comparison is false for NaN, which therefore comes out as NaN.
    out = tl.where(excess <= 0, 0, tl.where(x < 0, -excess, excess))
    tl.store(p_out + offsets, out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_block(
    p_grad, p_out, p_raw, p_grad_x, p_grad_raw, p_partial, block, cols,
    G: tl.constexpr, MASKED: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # S = sign(x) relu(|x| - g(s)), so on the survivors (S != 0)  dS/dx = 1 and dS/ds = -g'(s) sign(x) = -g'(s) sign(S),
    # and both are 0 elsewhere. The sum over the weights that share s is left to the reduction, as is -g'(s).
    _, offsets, mask = _place(block, cols, BLOCK)
    grad = tl.load(p_grad + offsets, mask=mask, other=0)
    out = tl.load(p_out + offsets, mask=mask, other=0)
    if MASKED:
        tl.store(p_grad_x + offsets, tl.where(tl.abs(out) > 0, grad, 0), mask=mask)
    sign = tl.where(out > 0, 1, tl.where(out < 0, -1, 0))
    signed = grad.to(COMPUTE) * sign.to(COMPUTE)
    if PER_WEIGHT:
        raw = tl.load(p_raw + offsets, mask=mask, other=0).to(COMPUTE)
        grad_raw = -threshold_derivative(raw, G) * signed
        tl.store(p_grad_raw + offsets, grad_raw.to(p_grad_raw.dtype.element_ty), mask=mask)
    else:
        tl.store(p_partial + block, tl.sum(signed, axis=0))


# The next two compile their block twice. Where rows are multiples of 16 elements the compiler is told so (x // 16 * 16)
# and moves 16 bytes at once. A choice at run time, by the shape alone, gives a tensor the same code, and so the same
# order of summation, alone and in a list.
@triton.jit
def _forward(
    p_x, p_raw, p_out, block, cols,
    G: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if cols % 16 == 0:
        _forward_block(p_x, p_raw, p_out, block, cols // 16 * 16, G, PER_WEIGHT, COMPUTE, BLOCK)
    else:
        _forward_block(p_x, p_raw, p_out, block, cols, G, PER_WEIGHT, COMPUTE, BLOCK)


@triton.jit
def _backward(
    p_grad, p_out, p_raw, p_grad_x, p_grad_raw, p_partial, block, cols,
    G: tl.constexpr, MASKED: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if cols % 16 == 0:
        _backward_block(
            p_grad, p_out, p_raw, p_grad_x, p_grad_raw, p_partial, block, cols // 16 * 16,
            G, MASKED, PER_WEIGHT, COMPUTE, BLOCK,
        )  # fmt: skip
    else:
        _backward_block(
            p_grad, p_out, p_raw, p_grad_x, p_grad_raw, p_partial, block, cols,
            G, MASKED, PER_WEIGHT, COMPUTE, BLOCK,
        )  # fmt: skip


@triton.jit
def _reduce(
    p_partial, p_raw, p_grad_raw, row, cols,
    G: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks_per_row = tl.cdiv(cols, BLOCK)
    p_row = p_partial + row * blocks_per_row
    total = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, blocks_per_row, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(p_row + i, mask=i < blocks_per_row, other=0)
    raw = tl.load(p_raw + row).to(COMPUTE)
    grad_raw = -threshold_derivative(raw, G) * tl.sum(total, axis=0)
    tl.store(p_grad_raw + row, grad_raw.to(p_grad_raw.dtype.element_ty))


@triton.jit(do_not_specialize=["cols"])
def soft_threshold_kernel(
    p_x, p_raw, p_out, cols: tl.int64,
    G: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S = sign(x) relu(|x| - g(s)) of one tensor."""
    _forward(p_x, p_raw, p_out, tl.program_id(0), cols, G, PER_WEIGHT, COMPUTE, BLOCK)


@triton.jit(do_not_specialize=["cols"])
def soft_threshold_backward_kernel(
    p_grad, p_out, p_raw, p_grad_x, p_grad_raw, p_partial, cols: tl.int64,
    G: tl.constexpr, MASKED: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dx of one tensor, and dL/ds: per weight, or the partial sums of its blocks."""
    _backward(
        p_grad, p_out, p_raw, p_grad_x, p_grad_raw, p_partial, tl.program_id(0), cols,
        G, MASKED, PER_WEIGHT, COMPUTE, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["cols"])
def soft_threshold_reduce_kernel(
    p_partial, p_raw, p_grad_raw, cols: tl.int64,
    G: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/ds of a row, from the partial sums of its blocks."""
    _reduce(p_partial, p_raw, p_grad_raw, tl.program_id(0), cols, G, COMPUTE, BLOCK)


# One row per tensor in the table of a list:
#   0 address of x (backward: of its gradient)   1 address of raw_threshold   2 elements per row
#   3 first element in the flat buffer           4 first program              5 first raw threshold in the flat buffer
COLUMNS = tl.constexpr(6)


@triton.jit
def _address(p_entry, like, ALIGNED: tl.constexpr):
    """An address out of the table as a pointer of the type of `like`."""
    pointer = tl.load(p_entry).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def soft_threshold_many_kernel(
    p_owner, p_table, like_x, like_raw, p_out,
    G: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`soft_threshold_kernel` for a list of tensors, found in a table."""
    pid = tl.program_id(0)
    p_entry = p_table + tl.load(p_owner + pid) * COLUMNS
    p_x = _address(p_entry, like_x, ALIGNED)
    p_raw = _address(p_entry + 1, like_raw, ALIGNED and PER_WEIGHT)
    cols = tl.load(p_entry + 2)
    # The launcher starts every tensor at a multiple of 16 elements of the flat buffer.
    p_out += tl.multiple_of(tl.load(p_entry + 3), 16)
    _forward(p_x, p_raw, p_out, pid - tl.load(p_entry + 4).to(tl.int32), cols, G, PER_WEIGHT, COMPUTE, BLOCK)


@triton.jit
def soft_threshold_many_backward_kernel(
    p_owner, p_table, like_grad, p_out, like_raw, p_grad_x, p_grad_raw, p_partial,
    G: tl.constexpr, MASKED: tl.constexpr, PER_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """`soft_threshold_backward_kernel` for a list of tensors, found in a table."""
    pid = tl.program_id(0)
    p_entry = p_table + tl.load(p_owner + pid) * COLUMNS
    p_grad = _address(p_entry, like_grad, ALIGNED)
    p_raw = _address(p_entry + 1, like_raw, ALIGNED and PER_WEIGHT)
    cols = tl.load(p_entry + 2)
    start = tl.multiple_of(tl.load(p_entry + 3), 16)
    first = tl.load(p_entry + 4)
    _backward(
        p_grad, p_out + start, p_raw, p_grad_x + start, p_grad_raw + start, p_partial + first,
        pid - first.to(tl.int32), cols, G, MASKED, PER_WEIGHT, COMPUTE, BLOCK,
    )  # fmt: skip


@triton.jit
def soft_threshold_many_reduce_kernel(
    p_owner, p_table, p_partial, like_raw, p_grad_raw,
    G: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`soft_threshold_reduce_kernel` for a list of tensors, found in a table."""
    pid = tl.program_id(0)
    p_entry = p_table + tl.load(p_owner + pid) * COLUMNS
    p_raw = _address(p_entry + 1, like_raw, False)
    cols = tl.load(p_entry + 2)
    first = tl.load(p_entry + 4)
    first_raw = tl.load(p_entry + 5)
    _reduce(p_partial + first, p_raw, p_grad_raw + first_raw, pid - first_raw.to(tl.int32), cols, G, COMPUTE, BLOCK)
