"""The time loop of a low-rank GRU, forward and backward: one launch walks through all steps.

    p = V^T h    r = sigmoid(x_r + W_r p + b_r)    z = sigmoid(x_z + W_z p + b_z)
    a = W_n p + b_n    n = tanh(x_n + r a)    h' = n + z (h - n)

`gates` is r | z | a. Where a sequence does not run (t >= its length) nothing is written: the launcher hands in zeros.
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
    w_r = load_rows(p_w, i_h, hidden, rank, BLOCK_R)
    w_z = load_rows(p_w + hidden * rank, i_h, hidden, rank, BLOCK_R)
    w_n = load_rows(p_w + 2 * hidden * rank, i_h, hidden, rank, BLOCK_R)
    return w_r, w_z, w_n, load_rows(p_v, i_h, hidden, rank, BLOCK_R)


@triton.jit
def _step(
    h, p, w_r, w_z, w_n, p_gates_x, p_bias, p_outputs, p_gates, p_n, i_h, row, hidden, active,
    HAS_LENGTHS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """h after the step, which it writes with all that the step saves. The pointers are at the step's first sequence."""
    exists = i_h < hidden
    mask = active & exists[:, None]
    o_h = row * hidden + i_h[:, None]
    o_g = row * (3 * hidden) + i_h[:, None]
    b_r = load(p_bias + i_h, exists, COMPUTE)[:, None]
    r = sigmoid(load(p_gates_x + o_g, mask, COMPUTE) + (up(w_r, p, PRECISION, COMPUTE) + b_r))
    b_n = load(p_bias + 2 * hidden + i_h, exists, COMPUTE)[:, None]
    a = up(w_n, p, PRECISION, COMPUTE) + b_n
    n = tanh(load(p_gates_x + 2 * hidden + o_g, mask, COMPUTE) + r * a)
    if SAVE:
        store(p_gates + o_g, r, mask)
        store(p_gates + 2 * hidden + o_g, a, mask)
        store(p_n + o_h, n, mask)
    b_z = load(p_bias + hidden + i_h, exists, COMPUTE)[:, None]
    z = sigmoid(load(p_gates_x + hidden + o_g, mask, COMPUTE) + (up(w_z, p, PRECISION, COMPUTE) + b_z))
    if SAVE:
        store(p_gates + hidden + o_g, z, mask)
    h = where_active(active, n + z * (h - n), h, HAS_LENGTHS)
    store(p_outputs + o_h, h, mask)
    return h


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_gru_forward_kernel(
    p_gates_x, p_w, p_v, p_bias, p_h0, p_lengths, p_outputs, p_p, p_gates, p_n, p_state,
    steps, batch, hidden, rank,
    HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Outputs, and with SAVE what the backward needs. p_state: scratch for h where it is not RESIDENT."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[None, :]
    i_r = tl.arange(0, BLOCK_R)[:, None]
    lengths = sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS)
    p_h0, p_state = p_h0 + first * hidden, p_state + first * hidden
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)

    # The state and p = V^T h, which each step leaves for the next.
    if RESIDENT:
        i_h = tl.arange(0, BLOCK_H)
        w_r, w_z, w_n, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
        o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
        h = load(p_h0 + o_h, m_h, COMPUTE)
        p = tl.sum(down(v, h, zero, PRECISION, COMPUTE), axis=0)
    else:
        pieces = zero
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            h = load(p_h0 + o_h, m_h, COMPUTE)
            store(p_state + o_h, h, m_h)
            pieces = down(load_rows(p_v, i_h, hidden, rank, BLOCK_R), h, pieces, PRECISION, COMPUTE)
        p = tl.sum(pieces, axis=0)
        tl.debug_barrier()

    for step in range(steps):
        t = time_index(step, steps, REVERSE)
        at = t * batch + first
        active = t < lengths
        if SAVE:
            store(p_p + at * rank + row * rank + i_r, p, active & (i_r < rank))
        p_x, p_g, p_out = p_gates_x + at * (3 * hidden), p_gates + at * (3 * hidden), p_outputs + at * hidden
        if RESIDENT:
            h = _step(
                h, p, w_r, w_z, w_n, p_x, p_bias, p_out, p_g, p_n + at * hidden, i_h, row, hidden, active,
                HAS_LENGTHS, SAVE, PRECISION, COMPUTE,
            )  # fmt: skip
            p = tl.sum(down(v, h, zero, PRECISION, COMPUTE), axis=0)
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h = start + tl.arange(0, BLOCK_H)
                w_r, w_z, w_n, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
                o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
                h = _step(
                    load(p_state + o_h, m_h, COMPUTE), p, w_r, w_z, w_n, p_x, p_bias, p_out, p_g, p_n + at * hidden,
                    i_h, row, hidden, active, HAS_LENGTHS, SAVE, PRECISION, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, h, m_h)
                pieces = down(v, h, pieces, PRECISION, COMPUTE)
            p = tl.sum(pieces, axis=0)
            # The next step's threads may read other elements of the state than they wrote.
            tl.debug_barrier()


@triton.jit
def _step_backward(
    carry, grad_p, pieces, w_r, w_z, w_n, v,
    p_grad_outputs, p_before, p_h0, p_gates, p_n, p_grad_x, p_grad_a, i_h, row, hidden, active, inside,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    # dL/dh' = grad_outputs + what later steps hand back: `carry`, elementwise, and V grad_p. With it (d)
    #   dL/dn_in = d (1 - z)(1 - n^2)    dL/dz_in = d (h - n) z (1 - z)    dL/dr_in = dL/dn_in a r (1 - r)
    #   dL/da = dL/dn_in r               grad_p = W_r^T dr_in + W_z^T dz_in + W_n^T da         carry = d z
    # Where a sequence does not run, d = 0, and carry and grad_p stay.
    mask = active & (i_h < hidden)[:, None]
    o_h = row * hidden + i_h[:, None]
    o_g = row * (3 * hidden) + i_h[:, None]
    d = carry + up(v, grad_p, PRECISION, COMPUTE) + load(p_grad_outputs + o_h, mask, COMPUTE)
    d = where_active(active, d, 0, HAS_LENGTHS)
    z = load(p_gates + hidden + o_g, mask, COMPUTE)
    n = load(p_n + o_h, mask, COMPUTE)
    d_z = d * (load_before(p_before, p_h0, o_h, mask, inside, COMPUTE) - n) * (z * (1 - z))
    store(p_grad_x + hidden + o_g, d_z, mask)
    pieces = down(w_z, d_z, pieces, PRECISION, COMPUTE)
    carry = where_active(active, d * z, carry, HAS_LENGTHS)
    d_n = d * (1 - z) * (1 - n * n)
    store(p_grad_x + 2 * hidden + o_g, d_n, mask)
    r = load(p_gates + o_g, mask, COMPUTE)
    d_r = d_n * load(p_gates + 2 * hidden + o_g, mask, COMPUTE) * (r * (1 - r))
    store(p_grad_x + o_g, d_r, mask)
    pieces = down(w_r, d_r, pieces, PRECISION, COMPUTE)
    d_a = d_n * r
    store(p_grad_a + o_h, d_a, mask)
    pieces = down(w_n, d_a, pieces, PRECISION, COMPUTE)
    return carry, pieces


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_gru_backward_kernel(
    p_grad_outputs, p_grad_h, p_outputs, p_gates, p_n, p_w, p_v, p_h0, p_lengths,
    p_grad_x, p_grad_a, p_grad_p, p_grad_h0, p_state,
    steps, batch, hidden, rank,
    HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of gates_x, a, p (all steps) and h0; those of W, V and the bias are products of them."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[None, :]
    i_r = tl.arange(0, BLOCK_R)[:, None]
    lengths = sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS)
    p_grad_h, p_h0, p_state = p_grad_h + first * hidden, p_h0 + first * hidden, p_state + first * hidden
    p_grad_h0 += first * hidden
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)

    if RESIDENT:
        i_h = tl.arange(0, BLOCK_H)
        w_r, w_z, w_n, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
        o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
        carry = load(p_grad_h + o_h, m_h, COMPUTE)
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            store(p_state + o_h, load(p_grad_h + o_h, m_h, COMPUTE), m_h)
        tl.debug_barrier()

    grad_p = tl.zeros([BLOCK_R, BLOCK_B], COMPUTE)
    for step in range(steps):
        t = time_index(step, steps, not REVERSE)
        at = t * batch + first
        active = t < lengths
        before, inside = time_before(t, lengths, REVERSE)
        p_grad, p_before = p_grad_outputs + at * hidden, p_outputs + (before * batch + first) * hidden
        p_g, p_x = p_gates + at * (3 * hidden), p_grad_x + at * (3 * hidden)
        if RESIDENT:
            carry, pieces = _step_backward(
                carry, grad_p, zero, w_r, w_z, w_n, v,
                p_grad, p_before, p_h0, p_g, p_n + at * hidden, p_x, p_grad_a + at * hidden, i_h, row, hidden,
                active, inside, HAS_LENGTHS, PRECISION, COMPUTE,
            )  # fmt: skip
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h = start + tl.arange(0, BLOCK_H)
                w_r, w_z, w_n, v = _load_factors(p_w, p_v, i_h, hidden, rank, BLOCK_R)
                o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
                carry, pieces = _step_backward(
                    load(p_state + o_h, m_h, COMPUTE), grad_p, pieces, w_r, w_z, w_n, v,
                    p_grad, p_before, p_h0, p_g, p_n + at * hidden, p_x, p_grad_a + at * hidden, i_h, row, hidden,
                    active, inside, HAS_LENGTHS, PRECISION, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, carry, m_h)
            tl.debug_barrier()
        grad_p = where_active(active, tl.sum(pieces, axis=0), grad_p, HAS_LENGTHS)
        store(p_grad_p + at * rank + row * rank + i_r, grad_p, active & (i_r < rank))

    if RESIDENT:
        store(p_grad_h0 + o_h, carry + up(v, grad_p, PRECISION, COMPUTE), m_h)
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            v = load_rows(p_v, i_h, hidden, rank, BLOCK_R)
            grad = load(p_state + o_h, m_h, COMPUTE) + up(v, grad_p, PRECISION, COMPUTE)
            store(p_grad_h0 + o_h, grad, m_h)
