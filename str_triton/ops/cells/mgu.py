"""The minimal gated unit of the low-rank recurrent ops. docs/derivations.md derives its backward."""

import torch
from torch import Tensor

from str_triton.ops.low_rank_cell import Backward, Cell, coupled_backward
from str_triton.ops.low_rank_rnn import run
from str_triton.ops.schedule import Schedule, with_ones


def _forward(schedule: Schedule, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor) -> tuple:
    hidden, rank = v.shape
    p_1, w_bias = with_ones((1, schedule.batch, rank), v), torch.cat((w, bias[:, None]), 1).t()
    gates, n = schedule.scratch(v, 2 * hidden), schedule.scratch(v, hidden)
    buffers = *gates_x.chunk(2, 2), p_1, p_1[..., :rank], gates, *gates.chunk(2, 2), n

    def step(previous, x_f, x_n, p_1, p, gates, f, hidden_n, n, state):
        torch.mm(previous, v, out=p)
        torch.mm(p_1, w_bias, out=gates)
        f.add_(x_f).sigmoid_()
        torch.addcmul(x_n, f, hidden_n, out=n).tanh_()
        torch.lerp(previous, n, f, out=state)

    return buffers, step


def _backward(run: Backward) -> tuple:
    a, a_n, keep = (run.chunk(width) for width in (2, 1, 1))

    def begin(span, begin, end, previous):
        _coefficients(a[span], a_n[span], keep[span], run.q[span], run.gates_x[begin:end], previous)

    return coupled_backward(run, begin, a.unflatten(2, (2, len(run.v))), a_n, keep)


def _coefficients(a: Tensor, a_n: Tensor, keep: Tensor, q: Tensor, gates_x: Tensor, previous: Tensor) -> None:
    """Form what dh is multiplied by: a for the gradients of R h + bias (f | n), a_n for that of gates_x's n.

        a_n = f (1 - n^2)        a = ((n - h_prev) + a_n hidden_n) f (1 - f)  |  a_n f        keep = 1 - f

    q comes as R h + bias and becomes (f | hidden_n).
    """
    f, hidden_n = q.chunk(2, 2)
    a_f, n = a.chunk(2, 2)  # n keeps the place of the coefficient that is formed last.
    x_f, x_n = gates_x.chunk(2, 2)
    f.add_(x_f).sigmoid_()
    torch.addcmul(x_n, f, hidden_n, out=n).tanh_()
    torch.ops.aten.tanh_backward.grad_input(f, n, grad_input=a_n)
    torch.sub(n, previous, out=a_f).addcmul_(a_n, hidden_n)
    torch.ops.aten.sigmoid_backward.grad_input(a_f, f, grad_input=a_f)
    torch.sub(torch.ones((), dtype=f.dtype), f, out=keep)
    torch.mul(a_n, f, out=n)


MGU = Cell("mgu", gates=2, forward=_forward, backward=_backward, saved=3)  # saved: f | a | n


def low_rank_mgu(
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
    """Run a minimal gated unit over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With gates_x_t = (x_f | x_n), R h + bias = (R_f h + b_f | R_n h + b_n), h from the step before:

        f = sigmoid(x_f + R_f h + b_f)
        n = tanh(x_n + f (R_n h + b_n))
        h' = (1 - f) h + f n

    One gate does the work of a GRU's two, with two thirds of its weights. As in torch's GRU, and unlike the source, the
    gate acts on R_n h, not on h.

    Args:
        gates_x: [T, B, 2 H], the input's part of the gates at all steps.
        u, m, v: [2 H, r], rows in the order of the gates; [r]; [H, r].
        bias: [2 H]; None for none.
        h0: [B, H], the state before each sequence's first step.

    Everything else, also dtypes, results and errors, is as in `low_rank_gru`.

    Source: Zhou et al., International Journal of Automation and Computing 13(3), 2016 (arXiv 1603.09420), equations
    6 to 8; the low-rank form: Kusupati et al., ICML 2020 (arXiv 2002.03231), section 3.3.
    """
    outputs, (h,) = run(MGU, gates_x, u, m, v, {"bias": bias}, {}, {"h0": h0}, lengths, reverse, precision, native)
    return outputs, h
