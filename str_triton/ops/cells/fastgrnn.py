"""The FastGRNN of the low-rank recurrent ops. docs/derivations.md derives its backward.

The registered op sees both biases in one tensor, (bias_gate | bias_update), and scale = (sigmoid(zeta), sigmoid(nu)).
"""

import torch
from torch import Tensor

from str_triton.ops.low_rank_cell import Backward, Cell
from str_triton.ops.low_rank_rnn import run
from str_triton.ops.schedule import Schedule


def _forward(
    schedule: Schedule, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, gates: Tensor
) -> tuple:
    hidden, rank = v.shape
    w_t, bias, (zeta, nu) = w.t(), bias.unflatten(0, (2, hidden)), scale.tolist()
    p, a, gates = schedule.scratch(v, rank), schedule.scratch(v, hidden), gates.unflatten(2, (2, hidden))
    buffers = gates_x, p, a, a.unsqueeze(2), gates, *gates.unbind(2)

    def step(previous, x, p, a, a_both, gates, z, c, state):
        torch.mm(previous, v, out=p)
        torch.addmm(x, p, w_t, out=a)
        torch.add(a_both, bias, out=gates)
        z.sigmoid_()
        c.tanh_()
        # h' = (zeta (1 - z) + nu) c + z h = (zeta + nu) c + z (h - zeta c)
        torch.sub(previous, c, alpha=zeta, out=a)
        torch.mul(c, zeta + nu, out=state).addcmul_(z, a)

    return buffers, step


def _backward(run: Backward) -> tuple:
    hidden, v_t, w, (dh,) = len(run.v), run.v.t(), run.w, run.grad_states
    a, a_z, dhs = (run.chunk(1) for _ in range(3))
    z, c = run.cells.unflatten(2, (2, hidden)).unbind(2)

    def begin(span, begin, end, previous):
        _coefficients(a[span], a_z[span], z[begin:end], c[begin:end], previous, run.scale)

    def step(k, grad, grad_x, z, grad_p):
        count = len(grad)
        dh_t = torch.add(dh[:count], grad, out=dhs[k, :count])
        torch.mul(a[k, :count], dh_t, out=grad_x)
        torch.mm(grad_x, w, out=grad_p)
        torch.mul(dh_t, z, out=dh[:count]).addmm_(grad_p, v_t)

    def end(span, begin, end):
        run.schedule.blank(dhs[span], begin)
        grad_z = a_z[span].mul_(dhs[span]).flatten(0, 1).sum(0)
        run.grad_bias += torch.stack((grad_z, run.grad_x[begin:end].flatten(0, 1).sum(0) - grad_z))
        dh_c = dhs[span].mul_(c[begin:end])
        grad_nu = dh_c.sum()
        run.grad_scale += torch.stack((grad_nu - dh_c.mul_(z[begin:end]).sum(), grad_nu))

    def factors(span, begin, end):
        return {"a": a[span], "keep": z[begin:end], "dhs": dhs[span]}

    return (run.grad_x, z), begin, step, end, factors


def _coefficients(a: Tensor, a_z: Tensor, z: Tensor, c: Tensor, previous: Tensor, scale: Tensor) -> None:
    """Form what dh is multiplied by: a_z for the gradient of z before its activation, a for that plus c's.

    a_z = (h_prev - zeta c) z (1 - z)        a = a_z + (zeta (1 - z) + nu)(1 - c^2)
    """
    zeta, nu = scale.tolist()
    torch.sub(previous, c, alpha=zeta, out=a_z)
    torch.ops.aten.sigmoid_backward.grad_input(a_z, z, grad_input=a_z)
    torch.mul(z, -zeta, out=a).add_(zeta + nu)
    torch.ops.aten.tanh_backward.grad_input(a, c, grad_input=a)
    a += a_z


# saved and kept: z | c
FASTGRNN = Cell("fastgrnn", gates=1, forward=_forward, backward=_backward, saved=2, kept=2, biases=2, scalars=2)


def low_rank_fastgrnn(
    gates_x: Tensor,
    u: Tensor,
    m: Tensor,
    v: Tensor,
    bias_gate: Tensor | None,
    bias_update: Tensor | None,
    zeta: Tensor,
    nu: Tensor,
    h0: Tensor,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
    precision: str | None = None,
    native: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a FastGRNN over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With a = gates_x_t + R h, h from the step before:

        z = sigmoid(a + bias_gate)
        c = tanh(a + bias_update)
        k = sigmoid(zeta) (1 - z) + sigmoid(nu)
        h' = k c + z h

    The gate z and the candidate c share both matrices: gates_x and u have H columns and rows, no stack of gates.

    Args:
        gates_x: [T, B, H], W x at all steps, no bias in it.
        u, m, v: [H, r], [r] and [H, r].
        bias_gate, bias_update: [H], those of z and c; None for none.
        zeta, nu: one element of any shape, raw: the op applies the sigmoid.
        h0: [B, H], the state before each sequence's first step.

    Everything else, also dtypes, results and errors, is as in `low_rank_gru`.

    Source: Kusupati et al., NeurIPS 2018 (arXiv 1901.02358), equations 3 to 5; Kusupati et al., ICML 2020 (arXiv
    2002.03231), section 3.3.
    """
    biases = {"bias_gate": bias_gate, "bias_update": bias_update}
    scalars, states = {"zeta": zeta, "nu": nu}, {"h0": h0}
    outputs, (h,) = run(FASTGRNN, gates_x, u, m, v, biases, scalars, states, lengths, reverse, precision, native)
    return outputs, h
