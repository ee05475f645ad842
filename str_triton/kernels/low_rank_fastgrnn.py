"""The time loop of a low-rank FastGRNN, forward and backward: one launch walks through all steps.

    p = V^T h    a = x + W p    z = sigmoid(a + b_z)    c = tanh(a + b_c)    h' = (zeta (1 - z) + nu) c + z h

`gates` is z | c, `scale` is zeta | nu. Where a sequence does not run (t >= its length) nothing is written: the launcher
hands in zeros.
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
def _step(
    h, p, w, zeta, nu, p_gates_x, p_bias, p_outputs, p_gates, i_h, row, hidden, active,
    HAS_LENGTHS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """h after the step, which it writes with all that the step saves. The pointers are at the step's first sequence."""
    exists = i_h < hidden
    mask = active & exists[:, None]
    o_h = row * hidden + i_h[:, None]
    o_g = row * (2 * hidden) + i_h[:, None]
    a = load(p_gates_x + o_h, mask, COMPUTE) + up(w, p, PRECISION, COMPUTE)
    z = sigmoid(a + load(p_bias + i_h, exists, COMPUTE)[:, None])
    c = tanh(a + load(p_bias + hidden + i_h, exists, COMPUTE)[:, None])
    if SAVE:
        store(p_gates + o_g, z, mask)
        store(p_gates + hidden + o_g, c, mask)
    # Where there is no hidden unit c is tanh(0).
    h = where_active(active, (zeta * (1 - z) + nu) * c + z * h, h, HAS_LENGTHS)
    store(p_outputs + o_h, h, mask)
    return h


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_fastgrnn_forward_kernel(
    p_gates_x, p_w, p_v, p_bias, p_scale, p_h0, p_lengths, p_outputs, p_p, p_gates, p_state,
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
    zeta, nu = tl.load(p_scale), tl.load(p_scale + 1)
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)

    # The state and p = V^T h, which each step leaves for the next.
    if RESIDENT:
        i_h = tl.arange(0, BLOCK_H)
        w, v = load_rows(p_w, i_h, hidden, rank, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
        h = load(p_h0 + row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None], COMPUTE)
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
        p_x, p_g, p_out = p_gates_x + at * hidden, p_gates + at * (2 * hidden), p_outputs + at * hidden
        if RESIDENT:
            h = _step(
                h, p, w, zeta, nu, p_x, p_bias, p_out, p_g, i_h, row, hidden, active,
                HAS_LENGTHS, SAVE, PRECISION, COMPUTE,
            )  # fmt: skip
            p = tl.sum(down(v, h, zero, PRECISION, COMPUTE), axis=0)
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h = start + tl.arange(0, BLOCK_H)
                w, v = load_rows(p_w, i_h, hidden, rank, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
                o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
                h = load(p_state + o_h, m_h, COMPUTE)
                h = _step(
                    h, p, w, zeta, nu, p_x, p_bias, p_out, p_g, i_h, row, hidden, active,
                    HAS_LENGTHS, SAVE, PRECISION, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, h, m_h)
                pieces = down(v, h, pieces, PRECISION, COMPUTE)
            p = tl.sum(pieces, axis=0)
            # The next step's threads may read other elements of the state than they wrote.
            tl.debug_barrier()


@triton.jit
def _step_backward(
    carry, grad_p, pieces, by_zeta, by_nu, w, v, zeta, nu,
    p_grad_outputs, p_before, p_h0, p_gates, p_grad_x, p_grad_gates, i_h, row, hidden, active, inside,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    # dL/dh' (d) = grad_outputs + what the step after hands back: `carry`, elementwise, and V grad_p. With it
    #   dL/dz_in = d (h - zeta c) z (1 - z)    dL/dc_in = d (zeta (1 - z) + nu)(1 - c^2)    dL/da = their sum
    #   dL/dzeta = sum of d (1 - z) c          dL/dnu = sum of d c     grad_p = W^T dL/da    carry = d z
    # Where a sequence does not run, d = 0, and carry and grad_p stay.
    mask = active & (i_h < hidden)[:, None]
    o_h = row * hidden + i_h[:, None]
    o_g = row * (2 * hidden) + i_h[:, None]
    d = carry + up(v, grad_p, PRECISION, COMPUTE) + load(p_grad_outputs + o_h, mask, COMPUTE)
    d = where_active(active, d, 0, HAS_LENGTHS)
    z = load(p_gates + o_g, mask, COMPUTE)
    c = load(p_gates + hidden + o_g, mask, COMPUTE)
    by_zeta += d * (1 - z) * c
    by_nu += d * c
    d_z = d * (load_before(p_before, p_h0, o_h, mask, inside, COMPUTE) - zeta * c) * (z * (1 - z))
    d_c = d * (zeta * (1 - z) + nu) * (1 - c * c)
    store(p_grad_gates + o_g, d_z, mask)
    store(p_grad_gates + hidden + o_g, d_c, mask)
    store(p_grad_x + o_h, d_z + d_c, mask)
    carry = where_active(active, d * z, carry, HAS_LENGTHS)
    return carry, down(w, d_z + d_c, pieces, PRECISION, COMPUTE), by_zeta, by_nu


@triton.jit(do_not_specialize=["steps", "batch"])
def low_rank_fastgrnn_backward_kernel(
    p_grad_outputs, p_grad_h, p_outputs, p_gates, p_w, p_v, p_scale, p_h0, p_lengths,
    p_grad_x, p_grad_gates, p_grad_p, p_grad_scale, p_grad_h0, p_state,
    steps, batch, hidden, rank,
    HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of gates_x, gates before their activations and p (all steps), of h0, and each program's of scale."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[None, :]
    i_r = tl.arange(0, BLOCK_R)[:, None]
    lengths = sequence_lengths(p_lengths, first, row, batch, steps, HAS_LENGTHS)
    p_grad_h, p_h0, p_state = p_grad_h + first * hidden, p_h0 + first * hidden, p_state + first * hidden
    p_grad_h0 += first * hidden
    zeta, nu = tl.load(p_scale), tl.load(p_scale + 1)
    zero = tl.zeros([SPLIT, BLOCK_R, BLOCK_B], COMPUTE)

    if RESIDENT:
        i_h = tl.arange(0, BLOCK_H)
        w, v = load_rows(p_w, i_h, hidden, rank, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
        o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
        carry = load(p_grad_h + o_h, m_h, COMPUTE)
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            store(p_state + o_h, load(p_grad_h + o_h, m_h, COMPUTE), m_h)
        tl.debug_barrier()

    grad_p = tl.zeros([BLOCK_R, BLOCK_B], COMPUTE)
    by_zeta = tl.zeros([BLOCK_H, BLOCK_B], COMPUTE)
    by_nu = tl.zeros([BLOCK_H, BLOCK_B], COMPUTE)
    for step in range(steps):
        t = time_index(step, steps, not REVERSE)
        at = t * batch + first
        active = t < lengths
        before, inside = time_before(t, lengths, REVERSE)
        p_grad, p_before = p_grad_outputs + at * hidden, p_outputs + (before * batch + first) * hidden
        p_g, p_x, p_gg = p_gates + at * (2 * hidden), p_grad_x + at * hidden, p_grad_gates + at * (2 * hidden)
        if RESIDENT:
            carry, pieces, by_zeta, by_nu = _step_backward(
                carry, grad_p, zero, by_zeta, by_nu, w, v, zeta, nu,
                p_grad, p_before, p_h0, p_g, p_x, p_gg, i_h, row, hidden, active, inside,
                HAS_LENGTHS, PRECISION, COMPUTE,
            )  # fmt: skip
        else:
            pieces = zero
            for start in range(0, hidden, BLOCK_H):
                i_h = start + tl.arange(0, BLOCK_H)
                w, v = load_rows(p_w, i_h, hidden, rank, BLOCK_R), load_rows(p_v, i_h, hidden, rank, BLOCK_R)
                o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
                carry, pieces, by_zeta, by_nu = _step_backward(
                    load(p_state + o_h, m_h, COMPUTE), grad_p, pieces, by_zeta, by_nu, w, v, zeta, nu,
                    p_grad, p_before, p_h0, p_g, p_x, p_gg, i_h, row, hidden, active, inside,
                    HAS_LENGTHS, PRECISION, COMPUTE,
                )  # fmt: skip
                store(p_state + o_h, carry, m_h)
            tl.debug_barrier()
        grad_p = where_active(active, tl.sum(pieces, axis=0), grad_p, HAS_LENGTHS)
        store(p_grad_p + at * rank + row * rank + i_r, grad_p, active & (i_r < rank))

    p_grad_scale += tl.program_id(0) * 2
    tl.store(p_grad_scale, tl.sum(tl.sum(by_zeta, axis=1), axis=0))
    tl.store(p_grad_scale + 1, tl.sum(tl.sum(by_nu, axis=1), axis=0))
    if RESIDENT:
        store(p_grad_h0 + o_h, carry + up(v, grad_p, PRECISION, COMPUTE), m_h)
    else:
        for start in range(0, hidden, BLOCK_H):
            i_h = start + tl.arange(0, BLOCK_H)
            o_h, m_h = row * hidden + i_h[:, None], (lengths > 0) & (i_h < hidden)[:, None]
            v = load_rows(p_v, i_h, hidden, rank, BLOCK_R)
            grad = load(p_state + o_h, m_h, COMPUTE) + up(v, grad_p, PRECISION, COMPUTE)
            store(p_grad_h0 + o_h, grad, m_h)
