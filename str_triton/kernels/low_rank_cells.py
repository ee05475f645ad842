"""The cells of the low-rank recurrent ops, elementwise: one step forward, and one step backward.

Forward: x are the gates' parts from the input, q those of the recurrent matrix (without bias), `state` what the cell
carries from step to step (c of an LSTM, else h), `scale` the cell's scalars. A cell returns the new state, h, and what
its backward needs.

Backward: d is dL/dh with everything that later steps hand back, `carry` dL/dc of an LSTM (others do not look at it),
`saved` what the forward saved and `before` the state before the step. A cell returns the gradients of x and of
q + bias, those that the launcher needs beside x's, what it hands back to the state before the step, and each element's
part of the gradients of the scalars. Where a sequence does not run, d is 0, and `saved` is 0 behind its end.

Tiles are [hidden units, sequences]. Derivations: docs/derivations.md.
"""

import triton
import triton.language as tl


@triton.jit
def exp2(x, APPROX: tl.constexpr):
    """Return 2^x. APPROX: by one NVIDIA instruction, to 2 ulp and without denormals."""
    if APPROX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, APPROX: tl.constexpr):
    """Return 1 / x. APPROX: by one NVIDIA instruction, to 1 ulp and without denormals."""
    if APPROX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1 / x


@triton.jit
def sigmoid(x, APPROX: tl.constexpr):
    """Return 1 / (1 + e^-x). If the exponential overflows to infinity, the quotient is 0, as it should be."""
    return reciprocal(1 + exp2(x * -1.4426950408889634, APPROX), APPROX)


@triton.jit
def tanh(x, APPROX: tl.constexpr):
    """Return 1 - 2 / (1 + e^2x). If the exponential overflows to infinity, the result is 1, as it should be."""
    return 1 - 2 * reciprocal(1 + exp2(x * 2.8853900817779268, APPROX), APPROX)


@triton.jit
def gru(x, q, bias, state, scale, APPROX: tl.constexpr):
    """Return h, h, and the saved (r, z, a, n) of one step of a GRU, each [H, B]."""
    r = sigmoid(x[0] + (q[0] + bias[0]), APPROX)
    z = sigmoid(x[1] + (q[1] + bias[1]), APPROX)
    a = q[2] + bias[2]
    n = tanh(x[2] + r * a, APPROX)
    h = n + z * (state - n)
    return h, h, (r, z, a, n)


@triton.jit
def gru_backward(d, carry, saved, before, scale, APPROX: tl.constexpr):
    """Return the gradients of x (r, z, n), of q, of a, of the h before, and of no scalar, each [H, B]."""
    r, z, a, n = saved
    d_z = d * (before - n) * (z * (1 - z))
    d_n = d * (1 - z) * (1 - n * n)
    d_r = d_n * a * (r * (1 - r))
    d_a = d_n * r
    return (d_r, d_z, d_n), (d_r, d_z, d_a), (d_a,), d * z, ()


@triton.jit
def lstm(x, q, bias, state, scale, APPROX: tl.constexpr):
    """Return c, h, and the saved (i, f, g, o, c) of one step of an LSTM, each [H, B]."""
    i = sigmoid(x[0] + (q[0] + bias[0]), APPROX)
    f = sigmoid(x[1] + (q[1] + bias[1]), APPROX)
    g = tanh(x[2] + (q[2] + bias[2]), APPROX)
    o = sigmoid(x[3] + (q[3] + bias[3]), APPROX)
    c = f * state + i * g
    return c, o * tanh(c, APPROX), (i, f, g, o, c)


@triton.jit
def lstm_backward(d, carry, saved, before, scale, APPROX: tl.constexpr):
    """Return the gradients of x (i, f, g, o), of q, nothing more, of the c before, and of no scalar, each [H, B]."""
    i, f, g, o, c = saved
    tanh_c = tanh(c, APPROX)
    d_o = d * tanh_c * (o * (1 - o))
    d_c = carry + d * o * (1 - tanh_c * tanh_c)
    d_f = d_c * before * (f * (1 - f))
    d_i = d_c * g * (i * (1 - i))
    d_g = d_c * i * (1 - g * g)
    return (d_i, d_f, d_g, d_o), (d_i, d_f, d_g, d_o), (), d_c * f, ()


@triton.jit
def fastgrnn(x, q, bias, state, scale, APPROX: tl.constexpr):
    """Return h, h, and the saved (z, c) of one step of a FastGRNN, each [H, B]."""
    zeta, nu = scale
    a = x[0] + q[0]
    z = sigmoid(a + bias[0], APPROX)
    c = tanh(a + bias[1], APPROX)
    h = (zeta * (1 - z) + nu) * c + z * state
    return h, h, (z, c)


@triton.jit
def fastgrnn_backward(d, carry, saved, before, scale, APPROX: tl.constexpr):
    """Return the gradients of x, of q, of z, of the h before, and the parts of those of zeta and nu, each [H, B]."""
    zeta, nu = scale
    z, c = saved
    d_z = d * (before - zeta * c) * (z * (1 - z))
    d_a = d_z + d * (zeta * (1 - z) + nu) * (1 - c * c)
    return (d_a,), (d_a,), (d_z,), d * z, (d * (1 - z) * c, d * c)


@triton.jit
def mgu(x, q, bias, state, scale, APPROX: tl.constexpr):
    """Return h, h, and the saved (f, a, n) of one step of an MGU, each [H, B]."""
    f = sigmoid(x[0] + (q[0] + bias[0]), APPROX)
    a = q[1] + bias[1]
    n = tanh(x[1] + f * a, APPROX)
    h = state + f * (n - state)
    return h, h, (f, a, n)


@triton.jit
def mgu_backward(d, carry, saved, before, scale, APPROX: tl.constexpr):
    """Return the gradients of x (f, n), of q, of a, of the h before, and of no scalar, each [H, B]."""
    f, a, n = saved
    d_n = d * f * (1 - n * n)
    d_f = (d * (n - before) + d_n * a) * (f * (1 - f))
    d_a = d_n * f
    return (d_f, d_n), (d_f, d_a), (d_a,), d * (1 - f), ()
