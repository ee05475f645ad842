"""The LSTM of the low-rank recurrent ops. docs/derivations.md derives its backward."""

import torch
from torch import Tensor

from str_triton.ops.low_rank_cell import Backward, Cell
from str_triton.ops.low_rank_rnn import run
from str_triton.ops.schedule import Schedule, with_ones


def _forward(schedule: Schedule, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor) -> tuple:
    hidden, rank = v.shape
    p_1, w_bias = with_ones((1, schedule.batch, rank), v), torch.cat((w, bias[:, None]), 1).t()
    gates = schedule.scratch(v, 4 * hidden)
    buffers = gates_x, p_1, p_1[..., :rank], gates, gates[..., : 2 * hidden], *gates.chunk(4, 2)

    def step(previous, previous_cell, x, p_1, p, gates, i_f, i, f, g, o, state, cell):
        torch.mm(previous, v, out=p)
        torch.mm(p_1, w_bias, out=gates).add_(x)
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, previous_cell, out=cell).addcmul_(i, g)
        torch.tanh(cell, out=state).mul_(o)

    return buffers, step


def _backward(run: Backward) -> tuple:
    hidden, v_t, w, (dh, dc) = len(run.v), run.v.t(), run.w, run.grad_states
    a, a_c = (run.chunk(width) for width in (4, 1))
    a_ifg, a_o = a[..., : 3 * hidden].unflatten(2, (3, hidden)), a[..., 3 * hidden :]
    grad_ifg, grad_o = run.grad_x[..., : 3 * hidden].unflatten(2, (3, hidden)), run.grad_x[..., 3 * hidden :]
    f = run.q[..., hidden : 2 * hidden]

    def begin(span, begin, end, previous):
        run.q[span].add_(run.gates_x[begin:end])
        before = run.schedule.previous_chunk(run.cells, run.states[1], begin, end)
        _coefficients(a[span], a_c[span], run.q[span], run.cells[begin:end], before)

    def step(k, grad, grad_ifg, grad_o, grad_gates, grad_p):
        count = len(grad)
        dh_t, dc_t = dh[:count].add_(grad), dc[:count]
        dc_t.addcmul_(dh_t, a_c[k, :count])
        torch.mul(a_ifg[k, :count], dc_t.unsqueeze(1), out=grad_ifg)
        torch.mul(a_o[k, :count], dh_t, out=grad_o)
        torch.mm(grad_gates, w, out=grad_p)
        torch.mm(grad_p, v_t, out=dh_t)
        dc_t.mul_(f[k, :count])

    def factors(span, begin, end):
        return {"a": a[span], "a_c": a_c[span], "keep": f[span], "dc": dc}

    return (grad_ifg, grad_o, run.grad_x), begin, step, lambda span, begin, end: None, factors


def _coefficients(a: Tensor, a_c: Tensor, gates: Tensor, cells: Tensor, previous: Tensor) -> None:
    """Form what dc is multiplied by for the gradients of i, f and g, what dh is for that of o, and for dc itself (a_c).

        a_c = o (1 - tanh(c)^2)    a = g i (1 - i)  |  c_prev f (1 - f)  |  i (1 - g^2)  |  tanh(c) o (1 - o)

    gates comes as gates_x + R h + bias and becomes (i | f | g | o); previous are the cells before each step.
    """
    hidden = cells.shape[2]
    i, f, g, o = gates.chunk(4, 2)
    a_i, a_f, a_g, a_o = a.chunk(4, 2)
    gates[..., : 2 * hidden].sigmoid_()
    g.tanh_()
    o.sigmoid_()
    torch.tanh(cells, out=a_g)
    torch.ops.aten.tanh_backward.grad_input(o, a_g, grad_input=a_c)
    torch.ops.aten.sigmoid_backward.grad_input(a_g, o, grad_input=a_o)
    torch.ops.aten.sigmoid_backward.grad_input(g, i, grad_input=a_i)
    torch.ops.aten.sigmoid_backward.grad_input(previous, f, grad_input=a_f)
    torch.ops.aten.tanh_backward.grad_input(i, g, grad_input=a_g)


LSTM = Cell(
    "lstm", gates=4, forward=_forward, backward=_backward, saved=5, extra=False, states=("h", "c"), has_dense=True
)  # saved: i | f | g | o | c


def low_rank_lstm(
    gates_x: Tensor,
    u: Tensor,
    m: Tensor,
    v: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
    precision: str | None = None,
    native: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run an LSTM over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With gates_x_t + R h + bias = (a_i | a_f | a_g | a_o), h and c from the step before:

        i = sigmoid(a_i)
        f = sigmoid(a_f)
        g = tanh(a_g)
        o = sigmoid(a_o)
        c' = f c + i g
        h' = o tanh(c')

    which are torch.nn.LSTM's equations, gates in its order (i, f, g, o).

    Args:
        gates_x: [T, B, 4 H], the input's part of the gates at all steps, torch's input bias b_ih included.
        u, m, v: [4 H, r], rows in the order of the gates; [r]; [H, r].
        bias: [4 H], torch's recurrent bias b_hh; None for none.
        h0, c0: [B, H], the states before each sequence's first step.

    Returns:
        outputs [T, B, H], h after every step, and (h, c), each [B, H], after each sequence's last processed step.

    Everything else, also dtypes and errors, is as in `low_rank_gru`.

    Source: Hochreiter, Schmidhuber, Neural Computation 9(8), 1997, with the forget gate of Gers et al., 2000, as torch
    has it; Kusupati et al., ICML 2020 (arXiv 2002.03231), section 3.3.
    """
    states = {"h0": h0, "c0": c0}
    outputs, (h, c) = run(LSTM, gates_x, u, m, v, {"bias": bias}, {}, states, lengths, reverse, precision, native)
    return outputs, (h, c)
