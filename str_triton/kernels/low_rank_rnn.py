"""The time loop of the low-rank recurrent ops, forward and backward, for every cell: one launch for all steps.

R h = W (V^T h) with W [gates * hidden, rank] and V [hidden, rank]. A program owns BLOCK_B sequences and walks through
time; its tiles are [hidden units, sequences], so that the many hidden units are the rows of a matrix product and are
shared out among the warps. The hidden units come in one tile, whose part of the factors stays on the chip (RESIDENT),
or in several of BLOCK_H, whose parts are read again in every step, while the state lies in a scratch buffer.
A product over the hidden units is cut into SPLIT pieces, one per warp, that are added up at the end: chains of SPLIT
times fewer dependent instructions, and no warp reads another's share.

What a cell computes is a function of kernels/low_rank_cells.py (STEP). For cells without a state c, p_c0 is None. Where
a sequence does not run (t >= its length) the outputs are not written: the launcher hands in zeros. Offsets from step to
step are int64; those within one step of one program fit int32.
"""

import triton
import triton.language as tl

from str_triton.kernels.time_loop import (
    down,
    load,
    load_factor,
    load_rows,
    load_scalars,
    load_step,
    load_tiles,
    place,
    sequence_lengths,
    store,
    store_saved,
    store_tiles,
    time_index,
    to_compute,
    up,
    where_active,
)


@triton.jit
def _forward(
    x, p, state, pieces, w, v, bias, scale, p_outputs, p_saved, o_h, o_s, hidden, mask, active,
    STEP: tl.constexpr, HAS_LENGTHS: tl.constexpr, SAVE: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    APPROX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute one step of a tile of hidden units. Return the new state and the tile's part of V^T h."""
    q = ()
    for i in tl.static_range(len(w)):
        q += (up(w[i], p, PRECISION, COMPUTE),)
    new, h, saved = STEP(to_compute(x, COMPUTE), q, bias, state, scale, APPROX)
    if SAVE:
        store_saved(p_saved, o_s, hidden, saved, mask, active, HAS_LENGTHS, WHOLE, pieces.shape[0])
    store(p_outputs + o_h, h, mask)
    return where_active(active, new, state, HAS_LENGTHS), down(v, h, pieces, PRECISION, COMPUTE)


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_rnn_forward_kernel(
    p_x, p_w, p_v, p_bias, p_scale, p_h0, p_c0, p_lengths, p_outputs, p_c, p_p, p_saved, p_state,
    steps, batch, hidden, rank,
    STEP: tl.constexpr, GATES: tl.constexpr, BIASES: tl.constexpr, SAVED: tl.constexpr, SCALARS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr, RESIDENT: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the outputs, the last c and, with SAVE, what the backward needs. p_state: scratch, unless RESIDENT."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[None, :]
    i_r = tl.arange(0, BLOCK_R)[:, None]
    lengths = sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS)
    p_h0, p_state = p_h0 + first * hidden, p_state + first * hidden
    p_s0 = p_h0
    if p_c0 is not None:
        p_s0 = p_c0 + first * hidden
        p_c += first * hidden
    scale = load_scalars(p_scale, SCALARS)
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)

    # The state and p = V^T h, which each step leaves for the next.
    if RESIDENT:
        i_h, exists, m_h, o_h, o_x, o_s = place(0, lengths, row, hidden, GATES, SAVED, BLOCK_H)
        w, v = load_factor(p_w, i_h, hidden, rank, GATES, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
        bias = to_compute(load_tiles(p_bias + i_h[:, None], hidden, exists, BIASES), COMPUTE)
        state = load(p_s0 + o_h, m_h, COMPUTE)
        p = tl.sum(down(v, load(p_h0 + o_h, m_h, COMPUTE), zero, PRECISION, COMPUTE), axis=0)
        t = time_index(0, steps, REVERSE)
        x = load_tiles(p_x + (t * batch + first) * (GATES * hidden) + o_x, hidden, (t < lengths) & exists, GATES)
    else:
        pieces = zero
        for start in range(0, hidden, BLOCK_H):
            i_h, _, m_h, o_h, _, _ = place(start, lengths, row, hidden, GATES, SAVED, BLOCK_H)
            h = load(p_h0 + o_h, m_h, COMPUTE)
            store(p_state + o_h, load(p_s0 + o_h, m_h, COMPUTE), m_h)
            pieces = down(load_rows(p_v, i_h, hidden, rank, BLOCK_R), h, pieces, PRECISION, COMPUTE)
        p = tl.sum(pieces, axis=0)
        tl.debug_barrier()

    for step in range(steps):
        t = time_index(step, steps, REVERSE)
        at = t * batch + first
        p_step = p_saved + (t * tl.num_programs(0) * BLOCK_B + first) * (SAVED * hidden)
        active = t < lengths
        if SAVE:
            store(p_p + at * rank + row * rank + i_r, p, active & (i_r < rank))
        if RESIDENT:
            # The next step's gates are on their way while this step computes.
            t = time_index(step + 1, steps, REVERSE)
            m_x = (t < lengths) & exists & (step + 1 < steps)
            x_next = load_tiles(p_x + (t * batch + first) * (GATES * hidden) + o_x, hidden, m_x, GATES)
            state, pieces = _forward(
                x, p, state, zero, w, v, bias, scale, p_outputs + at * hidden, p_step,
                o_h, o_s, hidden, active & exists, active,
                STEP, HAS_LENGTHS, SAVE, WHOLE, PRECISION, APPROX, COMPUTE,
            )  # fmt: skip
            x = x_next
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h, exists, m_h, o_h, o_x, o_s = place(start, lengths, row, hidden, GATES, SAVED, BLOCK_H)
                mask = active & exists
                w, v = load_factor(p_w, i_h, hidden, rank, GATES, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
                bias = to_compute(load_tiles(p_bias + i_h[:, None], hidden, exists, BIASES), COMPUTE)
                x = load_tiles(p_x + at * (GATES * hidden) + o_x, hidden, mask, GATES)
                state, pieces = _forward(
                    x, p, load(p_state + o_h, m_h, COMPUTE), pieces, w, v, bias, scale,
                    p_outputs + at * hidden, p_step, o_h, o_s, hidden, mask, active,
                    STEP, HAS_LENGTHS, SAVE, WHOLE, PRECISION, APPROX, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, state, m_h)
            # The next step's threads may read other elements of the state than they wrote.
            tl.debug_barrier()
        p = where_active(active, tl.sum(pieces, axis=0), p, HAS_LENGTHS)

    if p_c0 is not None:
        if RESIDENT:
            store(p_c + o_h, state, m_h)
        else:
            for start in range(0, hidden, BLOCK_H):
                i_h, _, m_h, o_h, _, _ = place(start, lengths, row, hidden, GATES, SAVED, BLOCK_H)
                store(p_c + o_h, load(p_state + o_h, m_h, COMPUTE), m_h)


@triton.jit
def _backward(
    loaded, carry, grad_p, pieces, sums, w, v, scale, p_grad_h, p_grad_x, p_grad_extra, o_h, o_x, hidden,
    mask, active, last,
    STEP: tl.constexpr, HAS_C: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    APPROX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Do one step backward for a tile [BLOCK_H, BLOCK_B]: return the carry, the pieces of grad_p, and the sums."""
    # dL/dh' (d) = grad_outputs + V grad_p of the step after + what that hands back elementwise (carry). An LSTM's carry
    # is dL/dc, and its h gets grad_h after the last step. Where a sequence does not run, d = 0 and the others stay.
    grad_output, before, saved = loaded
    d = up(v, grad_p, PRECISION, COMPUTE) + grad_output.to(COMPUTE)
    if HAS_C:
        d += load(p_grad_h + o_h, mask & last, COMPUTE)
    else:
        d += carry
    d = where_active(active, d, 0, HAS_LENGTHS)
    d_x, d_q, extra, back, parts = STEP(d, carry, to_compute(saved, COMPUTE), before.to(COMPUTE), scale, APPROX)
    store_tiles(p_grad_x + o_x, hidden, d_x, mask)
    store_tiles(p_grad_extra + o_h, hidden, extra, mask)
    for i in tl.static_range(len(w)):
        pieces = down(w[i], d_q[i], pieces, PRECISION, COMPUTE)
    totals = ()
    for i in tl.static_range(len(sums)):
        totals += (sums[i] + parts[i],)
    return where_active(active, back, carry, HAS_LENGTHS), pieces, totals


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_rnn_backward_kernel(
    p_grad_outputs, p_grad_h, p_grad_c, p_outputs, p_saved, p_w, p_v, p_scale, p_s0, p_lengths,
    p_grad_x, p_grad_extra, p_grad_p, p_grad_scale, p_grad_h0, p_grad_c0, p_state,
    steps, batch, hidden, rank,
    STEP: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, SCALARS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, APPROX: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of x, p (all steps), h0 and c0, what w and the bias need beside them, and each program's of scale."""
    HAS_C: tl.constexpr = p_grad_c is not None
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[None, :]
    i_r = tl.arange(0, BLOCK_R)[:, None]
    lengths = sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS)
    o_first = first * hidden
    p_grad_h, p_s0, p_state, p_grad_h0 = p_grad_h + o_first, p_s0 + o_first, p_state + o_first, p_grad_h0 + o_first
    p_grad_s = p_grad_h
    if HAS_C:
        p_grad_s, p_grad_c0 = p_grad_c + o_first, p_grad_c0 + o_first
    scale = load_scalars(p_scale, SCALARS)
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)
    grad_p = tl.zeros([BLOCK_R, BLOCK_B], COMPUTE)
    sums = ()
    for _i in tl.static_range(SCALARS):
        sums += (tl.zeros([BLOCK_H, BLOCK_B], COMPUTE),)

    if RESIDENT:
        i_h, exists, m_h, o_h, o_x, _ = place(0, lengths, row, hidden, GATES, SAVED, BLOCK_H)
        w, v = load_factor(p_w, i_h, hidden, rank, GATES, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
        carry = load(p_grad_s + o_h, m_h, COMPUTE)
        if AHEAD:
            loaded = load_step(
                time_index(0, steps, not REVERSE), lengths, exists, True, first, steps, batch, hidden, row, i_h,
                p_grad_outputs, p_outputs, p_saved, p_s0, REVERSE, SAVED, HAS_C, WHOLE, SPLIT,
            )  # fmt: skip
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h, _, m_h, o_h, _, _ = place(start, lengths, row, hidden, GATES, SAVED, BLOCK_H)
            store(p_state + o_h, load(p_grad_s + o_h, m_h, COMPUTE), m_h)
        tl.debug_barrier()

    for step in range(steps):
        t = time_index(step, steps, not REVERSE)
        at = t * batch + first
        active = t < lengths
        last = t == 0 if REVERSE else t + 1 == lengths
        p_x, p_extra = p_grad_x + at * (GATES * hidden), p_grad_extra + at * hidden
        if RESIDENT:
            if AHEAD:  # What the next step reads is on its way while this step computes.
                loaded_next = load_step(
                    time_index(step + 1, steps, not REVERSE), lengths, exists, step + 1 < steps, first, steps, batch,
                    hidden, row, i_h, p_grad_outputs, p_outputs, p_saved, p_s0, REVERSE, SAVED, HAS_C, WHOLE, SPLIT,
                )  # fmt: skip
            else:
                loaded = load_step(
                    t, lengths, exists, True, first, steps, batch, hidden, row, i_h,
                    p_grad_outputs, p_outputs, p_saved, p_s0, REVERSE, SAVED, HAS_C, WHOLE, SPLIT,
                )  # fmt: skip
            carry, pieces, sums = _backward(
                loaded, carry, grad_p, zero, sums, w, v, scale, p_grad_h, p_x, p_extra, o_h, o_x, hidden,
                active & exists, active, last, STEP, HAS_C, HAS_LENGTHS, PRECISION, APPROX, COMPUTE,
            )  # fmt: skip
            if AHEAD:
                loaded = loaded_next
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h, exists, m_h, o_h, o_x, _ = place(start, lengths, row, hidden, GATES, SAVED, BLOCK_H)
                w, v = load_factor(p_w, i_h, hidden, rank, GATES, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
                loaded = load_step(
                    t, lengths, exists, True, first, steps, batch, hidden, row, i_h,
                    p_grad_outputs, p_outputs, p_saved, p_s0, REVERSE, SAVED, HAS_C, WHOLE, SPLIT,
                )  # fmt: skip
                carry, pieces, sums = _backward(
                    loaded, load(p_state + o_h, m_h, COMPUTE), grad_p, pieces, sums, w, v, scale,
                    p_grad_h, p_x, p_extra, o_h, o_x, hidden,
                    active & exists, active, last, STEP, HAS_C, HAS_LENGTHS, PRECISION, APPROX, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, carry, m_h)
            tl.debug_barrier()
        grad_p = where_active(active, tl.sum(pieces, axis=0), grad_p, HAS_LENGTHS)
        store(p_grad_p + at * rank + row * rank + i_r, grad_p, active & (i_r < rank))

    for i in tl.static_range(SCALARS):
        tl.store(p_grad_scale + tl.program_id(0) * SCALARS + i, tl.sum(tl.sum(sums[i], axis=1), axis=0))
    for start in range(0, hidden, BLOCK_H):
        i_h, _, m_h, o_h, _, _ = place(start, lengths, row, hidden, GATES, SAVED, BLOCK_H)
        if not RESIDENT:
            v, carry = load_rows(p_v, i_h, hidden, rank, BLOCK_R), load(p_state + o_h, m_h, COMPUTE)
        grad = up(v, grad_p, PRECISION, COMPUTE)
        if HAS_C:
            store(p_grad_h0 + o_h, grad, m_h)
            store(p_grad_c0 + o_h, carry, m_h)
        else:
            store(p_grad_h0 + o_h, carry + grad, m_h)
