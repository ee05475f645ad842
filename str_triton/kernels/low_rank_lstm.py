"""The time loop of a low-rank LSTM, forward and backward: one launch walks through all steps.

    p = V^T h    i, f, o = sigmoid(x + W p + b)    g = tanh(x_g + W_g p + b_g)    c' = f c + i g    h' = o tanh(c')

`gates` is i | f | g | o after their activations, `cells` is c'. Where a sequence does not run (t >= its length) nothing
is written: the launcher hands in zeros.
"""

import triton
import triton.language as tl

from str_triton.kernels.time_loop import (
    down,
    load,
    load_before,
    load_rows,
    sequence_lengths,
    sigmoid,
    store,
    tanh,
    time_before,
    time_index,
    up,
    where_active,
)


@triton.jit
def _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R: tl.constexpr):
    w_i = load_rows(p_w, i_h, hidden, rank, BLOCK_R)
    w_f = load_rows(p_w + hidden * rank, i_h, hidden, rank, BLOCK_R)
    w_g = load_rows(p_w + 2 * hidden * rank, i_h, hidden, rank, BLOCK_R)
    w_o = load_rows(p_w + 3 * hidden * rank, i_h, hidden, rank, BLOCK_R)
    return w_i, w_f, w_g, w_o, load_rows(p_v, i_h, hidden, rank, BLOCK_R)


@triton.jit
def _gate(w, p, p_x, p_bias, exists, mask, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """What a gate's activation is taken of."""
    bias = load(p_bias, exists, COMPUTE)[:, None]
    return load(p_x, mask, COMPUTE) + (up(w, p, PRECISION, COMPUTE) + bias)


@triton.jit
def _step(
    c, p, w_i, w_f, w_g, w_o, p_gates_x, p_bias, p_outputs, p_gates, p_cells, i_h, row, hidden, active,
    HAS_LENGTHS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """c and h after the step, which it writes with all that the step saves. Pointers: the step's first sequence."""
    exists = i_h < hidden
    mask = active & exists[:, None]
    o_h = row * hidden + i_h[:, None]
    o_g = row * (4 * hidden) + i_h[:, None]
    p_x, p_b = p_gates_x + o_g, p_bias + i_h
    i = sigmoid(_gate(w_i, p, p_x, p_b, exists, mask, PRECISION, COMPUTE))
    g = tanh(_gate(w_g, p, p_x + 2 * hidden, p_b + 2 * hidden, exists, mask, PRECISION, COMPUTE))
    if SAVE:
        store(p_gates + o_g, i, mask)
        store(p_gates + 2 * hidden + o_g, g, mask)
    f = sigmoid(_gate(w_f, p, p_x + hidden, p_b + hidden, exists, mask, PRECISION, COMPUTE))
    c = where_active(active, f * c + i * g, c, HAS_LENGTHS)
    if SAVE:
        store(p_gates + hidden + o_g, f, mask)
        store(p_cells + o_h, c, mask)
    o = sigmoid(_gate(w_o, p, p_x + 3 * hidden, p_b + 3 * hidden, exists, mask, PRECISION, COMPUTE))
    h = o * tanh(c)
    if SAVE:
        store(p_gates + 3 * hidden + o_g, o, mask)
    store(p_outputs + o_h, h, mask)
    return c, h


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_lstm_forward_kernel(
    p_gates_x, p_w, p_v, p_bias, p_h0, p_c0, p_lengths, p_outputs, p_c, p_p, p_gates, p_cells, p_state,
    steps, batch, hidden, rank,
    HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Outputs, the last c, and with SAVE what the backward needs. p_state: scratch for c where it is not RESIDENT."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[None, :]
    i_r = tl.arange(0, BLOCK_R)[:, None]
    lengths = sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS)
    p_h0, p_c0 = p_h0 + first * hidden, p_c0 + first * hidden
    p_c, p_state = p_c + first * hidden, p_state + first * hidden
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)

    # The state c and p = V^T h, which each step leaves for the next.
    if RESIDENT:
        i_h = tl.arange(0, BLOCK_H)
        w_i, w_f, w_g, w_o, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
        o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
        c = load(p_c0 + o_h, m_h, COMPUTE)
        p = tl.sum(down(v, load(p_h0 + o_h, m_h, COMPUTE), zero, PRECISION, COMPUTE), axis=0)
    else:
        pieces = zero
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            store(p_state + o_h, load(p_c0 + o_h, m_h, COMPUTE), m_h)
            v = load_rows(p_v, i_h, hidden, rank, BLOCK_R)
            pieces = down(v, load(p_h0 + o_h, m_h, COMPUTE), pieces, PRECISION, COMPUTE)
        p = tl.sum(pieces, axis=0)
        tl.debug_barrier()

    for step in range(steps):
        t = time_index(step, steps, REVERSE)
        at = t * batch + first
        active = t < lengths
        if SAVE:
            store(p_p + at * rank + row * rank + i_r, p, active & (i_r < rank))
        p_x, p_g, p_out = p_gates_x + at * (4 * hidden), p_gates + at * (4 * hidden), p_outputs + at * hidden
        if RESIDENT:
            c, h = _step(
                c, p, w_i, w_f, w_g, w_o, p_x, p_bias, p_out, p_g, p_cells + at * hidden, i_h, row, hidden, active,
                HAS_LENGTHS, SAVE, PRECISION, COMPUTE,
            )  # fmt: skip
            pieces = down(v, h, zero, PRECISION, COMPUTE)
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h = start + tl.arange(0, BLOCK_H)
                w_i, w_f, w_g, w_o, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
                o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
                c, h = _step(
                    load(p_state + o_h, m_h, COMPUTE), p, w_i, w_f, w_g, w_o, p_x, p_bias, p_out, p_g,
                    p_cells + at * hidden, i_h, row, hidden, active, HAS_LENGTHS, SAVE, PRECISION, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, c, m_h)
                pieces = down(v, h, pieces, PRECISION, COMPUTE)
            # The next step's threads may read other elements of the state than they wrote.
            tl.debug_barrier()
        p = where_active(active, tl.sum(pieces, axis=0), p, HAS_LENGTHS)

    if RESIDENT:
        store(p_c + o_h, c, m_h)
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            store(p_c + o_h, load(p_state + o_h, m_h, COMPUTE), m_h)


@triton.jit
def _step_backward(
    carry, grad_p, pieces, w_i, w_f, w_g, w_o, v,
    p_grad_outputs, p_grad_h, p_cells, p_before, p_c0, p_gates, p_grad_x, i_h, row, hidden, active, last, inside,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    # dL/dh' (d) = grad_outputs + V grad_p of the step after, or grad_h after the last. With T = tanh(c')
    #   dL/do_in = d T o (1 - o)         dL/dc' (d_c) = carry of the step after + d o (1 - T^2)
    #   dL/di_in = d_c g i (1 - i)       dL/df_in = d_c c f (1 - f)       dL/dg_in = d_c i (1 - g^2)
    #   grad_p = sum of W^T of the four  carry = d_c f
    # Where a sequence does not run, d and d_c = 0, and carry and grad_p stay.
    mask = active & (i_h < hidden)[:, None]
    o_h = row * hidden + i_h[:, None]
    o_g = row * (4 * hidden) + i_h[:, None]
    d = up(v, grad_p, PRECISION, COMPUTE) + load(p_grad_outputs + o_h, mask, COMPUTE)
    d = where_active(active, d + load(p_grad_h + o_h, mask & last, COMPUTE), 0, HAS_LENGTHS)
    o = load(p_gates + 3 * hidden + o_g, mask, COMPUTE)
    tanh_c = tanh(load(p_cells + o_h, mask, COMPUTE))
    d_o = d * tanh_c * (o * (1 - o))
    store(p_grad_x + 3 * hidden + o_g, d_o, mask)
    pieces = down(w_o, d_o, pieces, PRECISION, COMPUTE)
    d_c = where_active(active, carry + d * o * (1 - tanh_c * tanh_c), 0, HAS_LENGTHS)
    f = load(p_gates + hidden + o_g, mask, COMPUTE)
    d_f = d_c * load_before(p_before, p_c0, o_h, mask, inside, COMPUTE) * (f * (1 - f))
    store(p_grad_x + hidden + o_g, d_f, mask)
    pieces = down(w_f, d_f, pieces, PRECISION, COMPUTE)
    carry = where_active(active, d_c * f, carry, HAS_LENGTHS)
    i = load(p_gates + o_g, mask, COMPUTE)
    g = load(p_gates + 2 * hidden + o_g, mask, COMPUTE)
    d_i = d_c * g * (i * (1 - i))
    store(p_grad_x + o_g, d_i, mask)
    pieces = down(w_i, d_i, pieces, PRECISION, COMPUTE)
    d_g = d_c * i * (1 - g * g)
    store(p_grad_x + 2 * hidden + o_g, d_g, mask)
    pieces = down(w_g, d_g, pieces, PRECISION, COMPUTE)
    return carry, pieces


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_lstm_backward_kernel(
    p_grad_outputs, p_grad_h, p_grad_c, p_cells, p_gates, p_w, p_v, p_c0, p_lengths,
    p_grad_x, p_grad_p, p_grad_h0, p_grad_c0, p_state,
    steps, batch, hidden, rank,
    HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of gates_x, p (all steps), h0 and c0; those of W, V and the bias are products of them."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[None, :]
    i_r = tl.arange(0, BLOCK_R)[:, None]
    lengths = sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS)
    p_grad_h, p_grad_c, p_c0 = p_grad_h + first * hidden, p_grad_c + first * hidden, p_c0 + first * hidden
    p_grad_h0, p_grad_c0 = p_grad_h0 + first * hidden, p_grad_c0 + first * hidden
    p_state += first * hidden
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)

    if RESIDENT:
        i_h = tl.arange(0, BLOCK_H)
        w_i, w_f, w_g, w_o, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
        o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
        carry = load(p_grad_c + o_h, m_h, COMPUTE)
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            store(p_state + o_h, load(p_grad_c + o_h, m_h, COMPUTE), m_h)
        tl.debug_barrier()

    grad_p = tl.zeros([BLOCK_R, BLOCK_B], COMPUTE)
    for step in range(steps):
        t = time_index(step, steps, not REVERSE)
        at = t * batch + first
        active = t < lengths
        before, inside = time_before(t, lengths, REVERSE)
        last = t == 0 if REVERSE else t + 1 == lengths
        p_grad, p_before = p_grad_outputs + at * hidden, p_cells + (before * batch + first) * hidden
        p_g, p_x = p_gates + at * (4 * hidden), p_grad_x + at * (4 * hidden)
        if RESIDENT:
            carry, pieces = _step_backward(
                carry, grad_p, zero, w_i, w_f, w_g, w_o, v,
                p_grad, p_grad_h, p_cells + at * hidden, p_before, p_c0, p_g, p_x, i_h, row, hidden,
                active, last, inside, HAS_LENGTHS, PRECISION, COMPUTE,
            )  # fmt: skip
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h = start + tl.arange(0, BLOCK_H)
                w_i, w_f, w_g, w_o, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
                o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
                carry, pieces = _step_backward(
                    load(p_state + o_h, m_h, COMPUTE), grad_p, pieces, w_i, w_f, w_g, w_o, v,
                    p_grad, p_grad_h, p_cells + at * hidden, p_before, p_c0, p_g, p_x, i_h, row, hidden,
                    active, last, inside, HAS_LENGTHS, PRECISION, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, carry, m_h)
            tl.debug_barrier()
        grad_p = where_active(active, tl.sum(pieces, axis=0), grad_p, HAS_LENGTHS)
        store(p_grad_p + at * rank + row * rank + i_r, grad_p, active & (i_r < rank))

    if RESIDENT:
        store(p_grad_h0 + o_h, up(v, grad_p, PRECISION, COMPUTE), m_h)
        store(p_grad_c0 + o_h, carry, m_h)
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            v = load_rows(p_v, i_h, hidden, rank, BLOCK_R)
            store(p_grad_h0 + o_h, up(v, grad_p, PRECISION, COMPUTE), m_h)
            store(p_grad_c0 + o_h, load(p_state + o_h, m_h, COMPUTE), m_h)
