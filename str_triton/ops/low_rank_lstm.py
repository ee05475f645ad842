"""The time loop of an LSTM whose recurrent matrix is R = u diag(m) v^T, forward and backward in one op each.

Source: Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, with the forget gate of Gers
et al., 2000, as torch has it; the low-rank form: Kusupati et al., ICML 2020, section 3.3.
Derivation of the backward: docs/derivations.md. Kernels: kernels/low_rank_lstm.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.schedule import Schedule, with_ones
from str_triton.ops.time_loop import check, compute_dtype, grad_v, kept, prepare, saved_shape

# ---- CPU implementation -------------------------------------------------------------------------------------------


def _forward(
    gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, c0: Tensor,
    lengths: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, compute = gates_x.dtype, compute_dtype(gates_x)
    schedule = Schedule(lengths, *gates_x.shape[:2], reverse)
    gates_x, h0, c0 = (schedule.sort(x, dim).to(compute) for x, dim in ((gates_x, 1), (h0, 0), (c0, 0)))
    w, v, bias = (tensor.to(compute) for tensor in (w, v, bias))
    cells = schedule.buffer(v, len(v)) if save else schedule.scratch(v, len(v))
    with torch.autocast("cpu", enabled=False):
        outputs = _run(schedule, gates_x, w, v, bias, h0, c0, cells)
    h, c = schedule.last(outputs), schedule.last(cells) if save else cells[0]
    h, c = (schedule.unsort(state, 0).to(dtype) for state in (h, c))
    p, gates = (gates_x.new_empty(0, dtype=dtype) for _ in range(2))
    return schedule.unsort(outputs, 1).to(dtype), h, c, p, gates, cells.to(dtype) if save else p.clone()


def _run(
    schedule: Schedule, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, c0: Tensor, cells: Tensor
) -> Tensor:
    """The loop itself."""
    hidden, rank = v.shape
    outputs = schedule.buffer(gates_x, hidden)
    p_1, w_bias = with_ones((1, schedule.batch, rank), v), torch.cat((w, bias[:, None]), 1).t()
    gates = schedule.scratch(v, 4 * hidden)
    tensors = gates_x, p_1, p_1[..., :rank], gates, gates[..., : 2 * hidden], *gates.chunk(4, 2), cells, outputs
    steps = list(zip(*(schedule.rows(tensor) for tensor in tensors), strict=True))
    states, cell_states = [step[-1] for step in steps], [step[-2] for step in steps]
    for time in schedule.times:
        x, p_1t, p_t, gates_t, i_f, i, f, g, o, cell, state = steps[time]
        torch.mm(schedule.previous(states, h0, time), v, out=p_t)
        torch.mm(p_1t, w_bias, out=gates_t).add_(x)
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, schedule.previous(cell_states, c0, time), out=cell).addcmul_(i, g)
        torch.tanh(cell, out=state).mul_(o)
    return outputs


def _backward(
    grad_outputs: Tensor, grad_h: Tensor, grad_c: Tensor, gates_x: Tensor, outputs: Tensor, p: Tensor, gates: Tensor,
    cells: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, compute = outputs.dtype, compute_dtype(outputs)
    schedule = Schedule(lengths, *outputs.shape[:2], reverse)
    by_time = (schedule.sort(tensor, 1).to(compute) for tensor in (grad_outputs, gates_x, outputs))
    by_sequence = (schedule.sort(tensor, 0).to(compute) for tensor in (grad_h, grad_c, h0, c0))
    cells, w, v, bias = (tensor.to(compute) for tensor in (cells, w, v, bias))  # cells is in the schedule's order.
    with torch.autocast("cpu", enabled=False):
        grads = _run_backward(schedule, *by_time, cells, *by_sequence, w, v, bias)
    grad_x, *others, grad_h0, grad_c0 = grads
    grad_x, grad_h0, grad_c0 = (schedule.unsort(x, dim) for x, dim in ((grad_x, 1), (grad_h0, 0), (grad_c0, 0)))
    return tuple(grad.to(dtype) for grad in (grad_x, *others, grad_h0, grad_c0))


def _run_backward(
    schedule: Schedule, grad_outputs: Tensor, gates_x: Tensor, outputs: Tensor, cells: Tensor,
    grad_h: Tensor, grad_c: Tensor, h0: Tensor, c0: Tensor, w: Tensor, v: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Chunks of time: the gates again, coefficients of dh and dc, the loop over the steps, and what needs no loop."""
    hidden, rank = v.shape
    grad_x, grad_p = schedule.buffer(v, 4 * hidden), schedule.buffer(v, rank)
    w_bias, v_t, dh, dc = torch.cat((w, bias[:, None]), 1), v.t(), grad_h.clone(), grad_c.clone()
    grad_w_bias = torch.zeros_like(w_bias)
    size = schedule.chunk(hidden)
    p_1 = with_ones((size, schedule.batch, rank), v)
    gates, a, a_c = (v.new_empty(size, schedule.batch, width * hidden) for width in (4, 4, 1))
    a_ifg, a_o = a[..., : 3 * hidden].unflatten(2, (3, hidden)), a[..., 3 * hidden :]
    f = gates[..., hidden : 2 * hidden]
    grad_ifg, grad_o = grad_x[..., : 3 * hidden].unflatten(2, (3, hidden)), grad_x[..., 3 * hidden :]
    rows = (schedule.rows(tensor) for tensor in (grad_outputs, grad_ifg, grad_o, grad_x, grad_p))
    steps = list(zip(*rows, strict=True))
    for begin, end in schedule.chunks(hidden):
        span = slice(0, end - begin)
        previous, p_flat = schedule.previous_chunk(outputs, h0, begin, end), p_1[span].flatten(0, 1)
        torch.mm(previous.flatten(0, 1), v, out=p_flat[:, :rank])
        torch.mm(p_flat, w_bias.t(), out=gates[span].flatten(0, 1))
        gates[span].add_(gates_x[begin:end])
        cell_chunks = cells[begin:end], schedule.previous_chunk(cells, c0, begin, end)
        _coefficients(a[span], a_c[span], gates[span], *cell_chunks)
        for time in schedule.backward_times(begin, end):
            grad, grad_ifg_t, grad_o_t, grad_gates, grad_p_t = steps[time]
            count, k = len(grad), time - begin
            dh_t, dc_t = dh[:count].add_(grad), dc[:count]
            dc_t.addcmul_(dh_t, a_c[k, :count])
            torch.mul(a_ifg[k, :count], dc_t.unsqueeze(1), out=grad_ifg_t)
            torch.mul(a_o[k, :count], dh_t, out=grad_o_t)
            torch.mm(grad_gates, w, out=grad_p_t)
            torch.mm(grad_p_t, v_t, out=dh_t)
            dc_t.mul_(f[k, :count])
        grad_w_bias.addmm_(grad_x[begin:end].flatten(0, 1).t(), p_flat)
    grad_v_ = grad_v(outputs, h0, grad_p, schedule.lengths, schedule.reverse)
    return grad_x, grad_w_bias[:, :-1].contiguous(), grad_v_, grad_w_bias[:, -1].clone(), dh, dc


def _coefficients(a: Tensor, a_c: Tensor, gates: Tensor, cells: Tensor, previous: Tensor) -> None:
    """What dc is multiplied by for the gradients of i, f and g, what dh is for that of o, and for dc itself (a_c).

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


# ---- Triton implementation ----------------------------------------------------------------------------------------


def _forward_triton(*arguments: Tensor | bool | None) -> tuple[Tensor, ...]:
    from str_triton.ops.low_rank_triton import lstm_forward

    return lstm_forward(*arguments)


def _backward_triton(
    grad_outputs: Tensor, grad_h: Tensor, grad_c: Tensor, gates_x: Tensor, outputs: Tensor, p: Tensor, gates: Tensor,
    cells: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from str_triton.ops.low_rank_triton import lstm_backward

    return lstm_backward(grad_outputs, grad_h, grad_c, outputs, p, gates, cells, w, v, h0, c0, lengths, reverse)


# ---- registration -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("str_triton", "FRAGMENT")
_LIBRARY.define(
    "low_rank_lstm(Tensor gates_x, Tensor w, Tensor v, Tensor bias, Tensor h0, Tensor c0, Tensor? lengths, "
    "bool reverse, bool save)"
    " -> (Tensor outputs, Tensor h, Tensor c, Tensor p, Tensor gates, Tensor cells)"
)
_LIBRARY.define(
    "low_rank_lstm_backward(Tensor grad_outputs, Tensor grad_h, Tensor grad_c, Tensor gates_x, Tensor outputs, "
    "Tensor p, Tensor gates, Tensor cells, Tensor w, Tensor v, Tensor bias, Tensor h0, Tensor c0, Tensor? lengths, "
    "bool reverse)"
    " -> (Tensor grad_gates_x, Tensor grad_w, Tensor grad_v, Tensor grad_bias, Tensor grad_h0, Tensor grad_c0)"
)
_LIBRARY.impl("low_rank_lstm", _forward, "CPU")
_LIBRARY.impl("low_rank_lstm", _forward_triton, "CUDA")
_LIBRARY.impl("low_rank_lstm_backward", _backward, "CPU")
_LIBRARY.impl("low_rank_lstm_backward", _backward_triton, "CUDA")


@torch.library.register_fake("str_triton::low_rank_lstm")
def _(gates_x, w, v, bias, h0, c0, lengths, reverse, save):
    steps, batch, _ = gates_x.shape
    hidden, rank = v.shape
    saved = [gates_x.new_empty(saved_shape(gates_x, width, save)) for width in (rank, 4 * hidden)]
    cells = gates_x.new_empty((steps, batch, hidden) if save else 0)
    h, c = (gates_x.new_empty(batch, hidden) for _ in range(2))
    return gates_x.new_empty(steps, batch, hidden), h, c, *saved, cells


@torch.library.register_fake("str_triton::low_rank_lstm_backward")
def _(grad_outputs, grad_h, grad_c, gates_x, outputs, p, gates, cells, w, v, bias, h0, c0, lengths, reverse):
    new = outputs.new_empty
    return new(*outputs.shape[:2], len(w)), *(new(tensor.shape) for tensor in (w, v, bias, h0, c0))


# ---- autograd -----------------------------------------------------------------------------------------------------


class _LowRankLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_x, w, v, bias, h0, c0, lengths, reverse):
        outputs, h, c, p, gates, cells = torch.ops.str_triton.low_rank_lstm(
            gates_x, w, v, bias, h0, c0, lengths, reverse, True
        )
        ctx.save_for_backward(kept(gates_x), outputs, p, gates, cells, w, v, bias, h0, c0, lengths)
        ctx.reverse = reverse
        return outputs, h, c

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs, grad_h, grad_c):
        grads = (grad.contiguous() for grad in (grad_outputs, grad_h, grad_c))
        return *torch.ops.str_triton.low_rank_lstm_backward(*grads, *ctx.saved_tensors, ctx.reverse), None, None


# ---- public function ----------------------------------------------------------------------------------------------


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
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With gates_x_t + R h + bias = (a_i | a_f | a_g | a_o), h and c from the step before:

        i = sigmoid(a_i),  f = sigmoid(a_f),  g = tanh(a_g),  o = sigmoid(a_o)
        c' = f c + i g
        h' = o tanh(c')

    which are torch.nn.LSTM's equations, gates in its order (i, f, g, o). Arithmetic is float64 if gates_x is, else
    float32, under autocast too; on a GPU float32 products run in TF32 if `torch.backends.cuda.matmul.fp32_precision` is
    "tf32". NaN at a step makes its sequence NaN from there on. The same inputs give the same bits.

    Args:
        gates_x: [T, B, 4 H], the input's part of the gates at all steps, torch's input bias b_ih included. float16,
            bfloat16, float32 or float64. T is at least 1.
        u: [4 H, r], rows in the order of the gates.
        m: [r], the spectrum as it applies: already thresholded.
        v: [H, r].
        bias: [4 H], torch's recurrent bias b_hh; None for none.
        h0, c0: [B, H], the states before each sequence's first step, in gates_x's dtype.
        lengths: int64 [B], each sequence's number of steps, 1 to T, in any order, on the CPU or gates_x's device;
            None if all are T. What lies behind a sequence's end is not read.
        reverse: run from each sequence's last step to its first. Outputs stay at their own time index.

    u, m, v and bias may have other dtypes of these four; u m, v and bias are rounded to gates_x's.

    Returns:
        outputs [T, B, H], h after every step, 0 behind a sequence's end, and (h, c), each [B, H]: the states after each
        sequence's last processed step. Differentiable once with respect to every tensor but lengths.

    Raises:
        TypeError: an argument that is no tensor of one of these dtypes; h0 or c0 of another dtype than gates_x;
            lengths of another dtype than int64.
        ValueError: shapes that do not fit one another, no time step, tensors on different devices, lengths outside 1
            to T (checked where that does not wait for a GPU).

    Source: Hochreiter, Schmidhuber, Neural Computation 9(8), 1997, as torch has it; Kusupati et al., ICML 2020 (arXiv
    2002.03231), section 3.3.
    """
    check(gates_x, {"u": u, "m": m, "v": v}, {"bias": bias}, {"h0": h0, "c0": c0}, lengths, gates=4)
    gates_x, w, v = prepare(gates_x, u, m, v)
    bias = gates_x.new_zeros(len(w)) if bias is None else bias.to(gates_x.dtype).contiguous()
    arguments = gates_x, w, v, bias, h0.contiguous(), c0.contiguous(), lengths, reverse
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments[:6]):
        outputs, h, c = _LowRankLSTM.apply(*arguments)
    else:
        outputs, h, c, *_ = torch.ops.str_triton.low_rank_lstm(*arguments, False)
    return outputs, (h, c)
