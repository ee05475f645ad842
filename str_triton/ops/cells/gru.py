"""The GRU of the low-rank recurrent ops. docs/derivations.md derives its backward."""

import torch
from torch import Tensor

from str_triton.ops.low_rank_cell import Backward, Cell, coupled_backward
from str_triton.ops.low_rank_rnn import run
from str_triton.ops.schedule import Schedule, with_ones


def _forward(schedule: Schedule, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor) -> tuple:
    hidden, rank = v.shape
    p_1, w_bias = with_ones((1, schedule.batch, rank), v), torch.cat((w, bias[:, None]), 1).t()
    gates, n = schedule.scratch(v, 3 * hidden), schedule.scratch(v, hidden)
    x_rz, x_n = gates_x.split((2 * hidden, hidden), 2)
    buffers = x_rz, x_n, p_1, p_1[..., :rank], gates, gates[..., : 2 * hidden], *gates.chunk(3, 2), n

    def step(previous, x_rz, x_n, p_1, p, gates, rz, r, z, hidden_n, n, state):
        torch.mm(previous, v, out=p)
        torch.mm(p_1, w_bias, out=gates)
        rz.add_(x_rz).sigmoid_()
        torch.addcmul(x_n, r, hidden_n, out=n).tanh_()
        torch.lerp(n, previous, z, out=state)

    return buffers, step


def _backward(run: Backward) -> tuple:
    hidden = len(run.v)
    a, a_n = (run.chunk(width) for width in (3, 1))

    def begin(span, begin, end, previous):
        _coefficients(a[span], a_n[span], run.q[span], run.gates_x[begin:end], previous)

    return coupled_backward(run, begin, a.unflatten(2, (3, hidden)), a_n, keep=run.q[..., hidden : 2 * hidden])


def _coefficients(a: Tensor, a_n: Tensor, gates: Tensor, gates_x: Tensor, previous: Tensor) -> None:
    """Form what dh is multiplied by: a for the gradients of R h + bias (r | z | n), a_n for that of gates_x's n.

        a_n = (1 - z)(1 - n^2)        a = a_n hidden_n r (1 - r)  |  (h_prev - n) z (1 - z)  |  a_n r

    gates comes as R h + bias and becomes (r | z | hidden_n).
    """
    hidden = previous.shape[2]
    rz, hidden_n = gates.split((2 * hidden, hidden), 2)
    a_r, a_z, n = a.chunk(3, 2)  # n keeps the place of the coefficient that is formed last.
    rz.add_(gates_x[..., : 2 * hidden]).sigmoid_()
    r, z = rz.chunk(2, 2)
    torch.addcmul(gates_x[..., 2 * hidden :], r, hidden_n, out=n).tanh_()
    torch.sub(torch.ones((), dtype=z.dtype), z, out=a_n)
    torch.ops.aten.tanh_backward.grad_input(a_n, n, grad_input=a_n)
    torch.mul(a_n, hidden_n, out=a_r)
    torch.ops.aten.sigmoid_backward.grad_input(a_r, r, grad_input=a_r)
    torch.sub(previous, n, out=a_z)
    torch.ops.aten.sigmoid_backward.grad_input(a_z, z, grad_input=a_z)
    torch.mul(a_n, r, out=n)


GRU = Cell("gru", gates=3, forward=_forward, backward=_backward, saved=4, has_dense=True)  # saved: r | z | a | n


def low_rank_gru(
    gates_x: Tensor,
    u: Tensor,
    m: Tensor,
    v: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
    precision: str | None = None,
    native: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a GRU over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With gates_x_t = (x_r | x_z | x_n), R h + bias = (R_r h + b_r | R_z h + b_z | R_n h + b_n), h from the step before:

        r = sigmoid(x_r + R_r h + b_r)
        z = sigmoid(x_z + R_z h + b_z)
        n = tanh(x_n + r (R_n h + b_n))
        h' = (1 - z) n + z h

    which are torch.nn.GRU's equations, gates in its order (r, z, n). Arithmetic is float64 if gates_x is, else
    float32, under autocast too. NaN at a step makes its sequence NaN from there on. The same inputs give the same bits.

    Args:
        gates_x: [T, B, 3 H], the input's part of the gates at all steps, torch's input bias b_ih included. float16,
            bfloat16, float32 or float64. T is at least 1.
        u: [3 H, r], rows in the order of the gates.
        m: [r], the spectrum as it applies: already thresholded.
        v: [H, r].
        bias: [3 H], torch's recurrent bias b_hh; None for none.
        h0: [B, H], the state before each sequence's first step, in gates_x's dtype.
        lengths: int64 [B], each sequence's number of steps, 1 to T, in any order, on the CPU or gates_x's device;
            None if all are T. What lies behind a sequence's end is not read. A CUDA graph takes those on the device.
        reverse: run from each sequence's last step to its first. Outputs stay at their own time index.
        precision: of float32 products on an NVIDIA GPU: "ieee", "tf32", or "tf32x3" (three TF32 products, nearly as
            exact as "ieee"); None follows torch's own layers, `torch.backends.cudnn.rnn.fp32_precision`.
        native: on the CPU, run the steps in C where that can be: float32 arithmetic, a C compiler at the first call.
            Outputs and gradients then differ by roundings.

    u, m, v and bias may have other dtypes of these four; u m, v and bias are rounded to gates_x's.

    Returns:
        outputs [T, B, H], the state after every step, 0 behind a sequence's end, and h [B, H], the state after each
        sequence's last processed step. Differentiable once with respect to every tensor but lengths, by
        autograd or `torch.func.grad`; `torch.func.vmap` loops over the batch.

    Raises:
        TypeError: an argument that is no tensor of one of these dtypes; h0 of another dtype than gates_x; lengths of
            another dtype than int64.
        ValueError: shapes that do not fit one another, no time step, tensors on different devices, lengths outside 1
            to T (checked where that does not wait for a GPU), unknown precision.

    Source: Cho et al., EMNLP 2014 (arXiv 1406.1078), in torch's variant; Kusupati et al., ICML 2020 (arXiv
    2002.03231), section 3.3.
    """
    outputs, (h,) = run(GRU, gates_x, u, m, v, {"bias": bias}, {}, {"h0": h0}, lengths, reverse, precision, native)
    return outputs, h
