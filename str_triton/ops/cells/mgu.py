"""The minimal gated unit of the low-rank recurrent ops.

Source: Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks", 2016, with the gate after the product, as in
torch's GRU; the low-rank form: Kusupati et al., ICML 2020, section 3.3.
Derivation of the backward: docs/derivations.md.
"""

import torch
from torch import Tensor

from str_triton.ops.low_rank_cell import Backward, Cell
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
    hidden, v_t, w, (dh,) = len(run.v), run.v.t(), run.w, run.grad_states
    a, a_n, keep, dhs = (run.chunk(width) for width in (2, 1, 1, 1))
    a_by_gate = a.unflatten(2, (2, hidden))

    def begin(span, begin, end, previous):
        _coefficients(a[span], a_n[span], keep[span], run.q[span], run.gates_x[begin:end], previous)

    def step(k, grad, grad_gates, grad_flat, grad_p):
        count = len(grad)
        dh_t = torch.add(dh[:count], grad, out=dhs[k, :count])
        torch.mul(a_by_gate[k, :count], dh_t.unsqueeze(1), out=grad_gates)
        torch.mm(grad_flat, w, out=grad_p)
        torch.mul(dh_t, keep[k, :count], out=dh[:count]).addmm_(grad_p, v_t)

    def end(span, begin, end):
        torch.mul(dhs[span], a_n[span], out=run.grad_x[begin:end, :, hidden:])
        run.schedule.blank(run.grad_x[begin:end], begin)

    return (run.grad_x.unflatten(2, (2, hidden)), run.grad_x), begin, step, end


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
) -> tuple[Tensor, Tensor]:
    """Run a minimal gated unit over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With gates_x_t = (x_f | x_n), R h + bias = (R_f h + b_f | R_n h + b_n), h from the step before:

        f = sigmoid(x_f + R_f h + b_f)
        n = tanh(x_n + f (R_n h + b_n))
        h' = (1 - f) h + f n

    One gate does the work of a GRU's two, with two thirds of its weights. As in torch's GRU, and unlike the source, the
    gate acts on R_n h, not on h. Arithmetic is float64 if gates_x is, else float32, under autocast too. NaN at a step
    makes its sequence NaN from there on. The same inputs give the same bits.

    Args:
        gates_x: [T, B, 2 H], the input's part of the gates at all steps. float16,
            bfloat16, float32 or float64. T is at least 1.
        u: [2 H, r], rows in the order of the gates.
        m: [r], the spectrum as it applies: already thresholded.
        v: [H, r].
        bias: [2 H]; None for none.
        h0: [B, H], the state before each sequence's first step, in gates_x's dtype.
        lengths: int64 [B], each sequence's number of steps, 1 to T, in any order, on the CPU or gates_x's device;
            None if all are T. What lies behind a sequence's end is not read. A CUDA graph takes those on the device.
        reverse: run from each sequence's last step to its first. Outputs stay at their own time index.
        precision: of float32 products on an NVIDIA GPU: "ieee", "tf32", or "tf32x3" (three TF32 products, nearly as
            exact as "ieee"); None follows torch's own layers, `torch.backends.cudnn.rnn.fp32_precision`.

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

    Source: Zhou et al., International Journal of Automation and Computing 13(3), 2016 (arXiv 1603.09420), equations
    6 to 8; the low-rank form: Kusupati et al., ICML 2020 (arXiv 2002.03231), section 3.3.
    """
    outputs, (h,) = run(MGU, gates_x, u, m, v, {"bias": bias}, {}, {"h0": h0}, lengths, reverse, precision)
    return outputs, h
