"""The parts that the time loops of kernels/low_rank_rnn.py share: tiles, products, and the indices of a step."""

import triton
import triton.language as tl


@triton.jit
def place(start, lengths, row, hidden, GATES: tl.constexpr, SAVED: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return hidden units, masks (that exist; with a step to do), and offsets within a step's h, x and saved blocks."""
    i_h = start + tl.arange(0, BLOCK_H)
    exists = (i_h < hidden)[:, None]
    o_h, o_x, o_s = row * hidden, row * (GATES * hidden), row * (SAVED * hidden)
    return i_h, exists, (lengths > 0) & exists, o_h + i_h[:, None], o_x + i_h[:, None], o_s + i_h[:, None]


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr):
    """Load values in the dtype of the arithmetic, with 0 where the mask is off."""
    return tl.load(pointers, mask=mask, other=0).to(COMPUTE)


@triton.jit
def store(pointers, values, mask):
    """Store values in the dtype of the memory."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_tiles(pointers, stride, mask, COUNT: tl.constexpr):
    """Load COUNT tiles, `stride` apart. They keep the dtype of the memory, which needs few registers."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles += (tl.load(pointers + i * stride, mask=mask, other=0),)
    return tiles


@triton.jit
def to_compute(tiles, COMPUTE: tl.constexpr):
    """Return the tiles in the dtype of the arithmetic; the shapes stay."""
    converted = ()
    for i in tl.static_range(len(tiles)):
        converted += (tiles[i].to(COMPUTE),)
    return converted


@triton.jit
def store_tiles(pointers, stride, tiles, mask):
    """Store tiles [BLOCK_H, BLOCK_B] in the dtype of the memory, `stride` apart."""
    for i in tl.static_range(len(tiles)):
        store(pointers + i * stride, tiles[i], mask)


@triton.jit
def store_saved(
    p_step, o_s, stride, tiles, mask, active, HAS_LENGTHS: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store what a step saves; WHOLE: each tile as one piece, in the order in which threads hold a matrix product.

    So nothing passes through shared memory. NVIDIA's order: of 16 rows and 8 columns a thread has rows n and n + 8, in
    each two columns; the order is no more than speed elsewhere. Where a sequence does not run 0 is stored.
    """
    if WHOLE:
        H: tl.constexpr = tiles[0].shape[0]
        B: tl.constexpr = tiles[0].shape[1]
        for i in tl.static_range(len(tiles)):
            tile = where_active(active, tiles[i], 0, HAS_LENGTHS)
            tile = tl.reshape(tile, [H // SPLIT // 16, SPLIT, 2, 8, B // 2, 2])
            tile = tl.reshape(tl.permute(tile, (1, 3, 4, 0, 2, 5)), [H * B])
            tl.store(p_step + i * H * B + tl.arange(0, H * B), tile.to(p_step.dtype.element_ty))
    else:
        store_tiles(p_step + o_s, stride, tiles, mask)


@triton.jit
def load_saved(
    p_step, o_s, stride, mask, wanted, FIRST: tl.constexpr, END: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Load tiles FIRST to END of what `store_saved` stored."""
    if WHOLE:
        H: tl.constexpr = o_s.shape[0]
        B: tl.constexpr = o_s.shape[1]
        tiles = ()
        for i in tl.static_range(FIRST, END):
            tile = tl.load(p_step + i * H * B + tl.arange(0, H * B), mask=wanted, other=0)
            tile = tl.reshape(tile, [SPLIT, 8, B // 2, H // SPLIT // 16, 2, 2])
            tiles += (tl.reshape(tl.permute(tile, (3, 0, 4, 1, 2, 5)), [H, B]),)
    else:
        tiles = load_tiles(p_step + FIRST * stride + o_s, stride, mask, END - FIRST)
    return tiles


@triton.jit
def load_rows(p_factor, i_h, hidden, rank, BLOCK_R: tl.constexpr):
    """Load the rows i_h of a factor [hidden, rank], as [BLOCK_H, BLOCK_R], with 0 outside the factor."""
    i_r = tl.arange(0, BLOCK_R)
    mask = (i_h[:, None] < hidden) & (i_r[None, :] < rank)
    return tl.load(p_factor + i_h[:, None] * rank + i_r[None, :], mask=mask, other=0)


@triton.jit
def load_factor(p_w, i_h, hidden, rank, GATES: tl.constexpr, BLOCK_R: tl.constexpr):
    """Load the gates' parts of W."""
    w = ()
    for i in tl.static_range(GATES):
        w += (load_rows(p_w + i * hidden * rank, i_h, hidden, rank, BLOCK_R),)
    return w


@triton.jit
def load_scalars(p_scale, COUNT: tl.constexpr):
    """Load the cell's COUNT scalars, each of shape []."""
    scale = ()
    for i in tl.static_range(COUNT):
        scale += (tl.load(p_scale + i),)
    return scale


@triton.jit
def up(factor, p, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """Return factor p, the product of [BLOCK_H, BLOCK_R] and [BLOCK_R, BLOCK_B]."""
    return tl.dot(factor, p.to(factor.dtype), input_precision=PRECISION, out_dtype=COMPUTE)


@triton.jit
def down(factor, x, total, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """Return total [SPLIT, BLOCK_R, BLOCK_B] + factor^T x, of [BLOCK_H, BLOCK_R] and [BLOCK_H, BLOCK_B]."""
    SPLIT: tl.constexpr = total.shape[0]
    PIECE: tl.constexpr = factor.shape[0] // SPLIT
    factor = tl.permute(tl.reshape(factor, [SPLIT, PIECE, factor.shape[1]]), (0, 2, 1))
    x = tl.reshape(x.to(factor.dtype), [SPLIT, PIECE, x.shape[1]])
    return tl.dot(factor, x, total, input_precision=PRECISION, out_dtype=COMPUTE)


@triton.jit
def sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS: tl.constexpr):
    """Return the number of steps of each sequence [1, BLOCK_B], 0 for a sequence that does not exist."""
    exists = first + row < batch
    if HAS_LENGTHS:
        return tl.load(p_lengths + first + row, mask=exists, other=0)
    else:
        return tl.where(exists, steps, 0).to(tl.int64)


@triton.jit
def where_active(active, new, old, HAS_LENGTHS: tl.constexpr):
    """Return new where a sequence is active, else old. Without lengths all sequences that exist are active: new."""
    if HAS_LENGTHS:
        new = tl.where(active, new, old)
    return new


@triton.jit
def time_index(step, steps, REVERSE: tl.constexpr):
    """Return the time index of step number `step`, as int64."""
    t = steps - 1 - step if REVERSE else step
    return t.to(tl.int64)


@triton.jit
def load_step(
    t, lengths, exists, wanted, first, steps, batch, hidden, row, i_h, p_grad_outputs, p_outputs, p_saved, p_s0,
    REVERSE: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Load the gradient of the output of step t, the state before it, and what the step saved."""
    at = t * batch + first
    mask = (t < lengths) & exists & wanted
    o_h, o_s = row * hidden + i_h[:, None], row * (SAVED * hidden) + i_h[:, None]
    # The time index of the state before, and which sequences have one: the others begin with p_s0.
    if REVERSE:
        before, inside = tl.minimum(t + 1, steps - 1), t + 1 < lengths
    else:
        before, inside = tl.maximum(t - 1, 0), (t > 0) & (lengths > 0)
    width = tl.num_programs(0) * row.shape[1]
    if HAS_C:  # c is the last of what a step saves.
        p_before = p_saved + (before * width + first) * (SAVED * hidden)
        (state,) = load_saved(p_before, o_s, hidden, mask & inside, wanted, SAVED - 1, SAVED, WHOLE, SPLIT)
        if WHOLE:
            state = tl.where(inside, state, 0)
    else:
        state = tl.load(p_outputs + (before * batch + first) * hidden + o_h, mask=mask & inside, other=0)
    # One of the two loads gives 0.
    state += tl.load(p_s0 + o_h, mask=mask & (inside == 0), other=0)
    grad = tl.load(p_grad_outputs + at * hidden + o_h, mask=mask, other=0)
    p_step = p_saved + (t * width + first) * (SAVED * hidden)
    return grad, state, load_saved(p_step, o_s, hidden, mask, wanted, 0, SAVED, WHOLE, SPLIT)
