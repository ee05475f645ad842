"""What the low-rank time loops share: activations, the two thin products, and where a step lies in memory.

R h = W (V^T h) with W [gates * hidden, rank] and V [hidden, rank]. A program owns BLOCK_B sequences and walks through
time; its tiles are [hidden units, sequences], so that the many hidden units are the rows of a matrix product and are
shared out among the warps. The hidden units come in one tile, whose part of the factors stays on the chip (RESIDENT),
or in several of BLOCK_H, whose parts are read again in every step, while the state lies in a scratch buffer.
A product over the hidden units is cut into SPLIT pieces, one per warp, that are added up at the end: chains of SPLIT
times fewer dependent instructions, and no warp reads another's share.

Offsets from step to step are int64; those within one step of one program fit int32.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Where exp overflows to infinity the quotient is 0, as it should be."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Where exp overflows to infinity it is 1, as it should be."""
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr):
    """In the dtype of the arithmetic; 0 where the mask is off."""
    return tl.load(pointers, mask=mask, other=0).to(COMPUTE)


@triton.jit
def store(pointers, values, mask):
    """In the dtype of the memory."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(p_factor, i_h, hidden, rank, BLOCK_R: tl.constexpr):
    """Rows i_h of a factor [hidden, rank], as [BLOCK_H, BLOCK_R]; 0 where there is none."""
    i_r = tl.arange(0, BLOCK_R)
    mask = (i_h[:, None] < hidden) & (i_r[None, :] < rank)
    return tl.load(p_factor + i_h[:, None] * rank + i_r[None, :], mask=mask, other=0)


@triton.jit
def up(factor, p, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """factor p: [BLOCK_H, BLOCK_R] by [BLOCK_R, BLOCK_B]."""
    return tl.dot(factor, p.to(factor.dtype), input_precision=PRECISION, out_dtype=COMPUTE)


@triton.jit
def down(factor, x, total, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """factor^T x, of [BLOCK_H, BLOCK_R] and [BLOCK_H, BLOCK_B], added to total [SPLIT, BLOCK_R, BLOCK_B]."""
    SPLIT: tl.constexpr = total.shape[0]
    PIECE: tl.constexpr = factor.shape[0] // SPLIT
    factor = tl.permute(tl.reshape(factor, [SPLIT, PIECE, factor.shape[1]]), (0, 2, 1))
    x = tl.reshape(x.to(factor.dtype), [SPLIT, PIECE, x.shape[1]])
    return tl.dot(factor, x, total, input_precision=PRECISION, out_dtype=COMPUTE)


@triton.jit
def sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS: tl.constexpr):
    """[1, BLOCK_B]: how many steps each sequence has; 0 for one that does not exist."""
    exists = first + row < batch
    if HAS_LENGTHS:
        lengths = tl.load(p_lengths + first + row, mask=exists, other=0)
    else:
        lengths = tl.where(exists, steps, 0).to(tl.int64)
    return lengths


@triton.jit
def where_active(active, new, old, HAS_LENGTHS: tl.constexpr):
    """new, but old where a sequence does not run. Without lengths only those do not that do not exist: none to keep."""
    if HAS_LENGTHS:
        new = tl.where(active, new, old)
    return new


@triton.jit
def time_index(step, steps, REVERSE: tl.constexpr):
    """Of the step-th step, in int64."""
    t = steps - 1 - step if REVERSE else step
    return t.to(tl.int64)


@triton.jit
def time_before(t, lengths, REVERSE: tl.constexpr):
    """The time index of the state that step t starts from, and for which sequences there is one: others have h0."""
    if REVERSE:
        before = t + 1
        inside = before < lengths
    else:
        before = tl.maximum(t - 1, 0)
        inside = (t > 0) & (lengths > 0)
    return before, inside


@triton.jit
def load_before(p_outputs, p_h0, offsets, mask, inside, COMPUTE: tl.constexpr):
    """From p_outputs (at the step before) where `inside`, else from p_h0: one of the two loads gives 0."""
    h = tl.load(p_outputs + offsets, mask=mask & inside, other=0)
    h0 = tl.load(p_h0 + offsets, mask=mask & (inside == 0), other=0)
    return (h + h0).to(COMPUTE)
