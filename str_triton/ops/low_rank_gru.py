"""The time loop of a GRU whose recurrent matrix is R = u diag(m) v^T, forward and backward in one op each.

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014, in torch's variant (the
reset gate after the product); the low-rank form: Kusupati et al., ICML 2020, section 3.3.
Derivation of the backward: docs/derivations.md. Kernels: kernels/low_rank_gru.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.schedule import Schedule, with_ones
from str_triton.ops.time_loop import check, compute_dtype, grad_v, kept, prepare, saved_shape

# ---- CPU implementation -------------------------------------------------------------------------------------------


def _forward(
    gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, compute = gates_x.dtype, compute_dtype(gates_x)
    schedule = Schedule(lengths, *gates_x.shape[:2], reverse)
    gates_x, h0 = schedule.sort(gates_x, 1).to(compute), schedule.sort(h0, 0).to(compute)
    w, v, bias = (tensor.to(compute) for tensor in (w, v, bias))
    with torch.autocast("cpu", enabled=False):
        outputs = _run(schedule, gates_x, w, v, bias, h0)
    h = schedule.unsort(schedule.last(outputs), 0).to(dtype)
    p, gates, n = (gates_x.new_empty(0, dtype=dtype) for _ in range(3))
    return schedule.unsort(outputs, 1).to(dtype), h, p, gates, n


def _run(schedule: Schedule, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, h0: Tensor) -> Tensor:
    """The loop itself."""
    hidden, rank = v.shape
    outputs = schedule.buffer(gates_x, hidden)
    p_1, w_bias = with_ones((1, schedule.batch, rank), v), torch.cat((w, bias[:, None]), 1).t()
    gates, n = schedule.scratch(v, 3 * hidden), schedule.scratch(v, hidden)
    r, z, hidden_n = gates.chunk(3, 2)
    tensors = gates_x[..., : 2 * hidden], gates_x[..., 2 * hidden :], p_1, p_1[..., :rank], gates
    tensors = *tensors, gates[..., : 2 * hidden], r, z, hidden_n, n, outputs
    steps = list(zip(*(schedule.rows(tensor) for tensor in tensors), strict=True))
    states = [step[-1] for step in steps]
    for time in schedule.times:
        x_rz, x_n, p_1t, p_t, gates_t, rz_t, r_t, z_t, hidden_t, n_t, state = steps[time]
        previous = schedule.previous(states, h0, time)
        torch.mm(previous, v, out=p_t)
        torch.mm(p_1t, w_bias, out=gates_t)
        rz_t.add_(x_rz).sigmoid_()
        torch.addcmul(x_n, r_t, hidden_t, out=n_t).tanh_()
        torch.lerp(n_t, previous, z_t, out=state)
    return outputs


def _backward(
    grad_outputs: Tensor, grad_h: Tensor, gates_x: Tensor, outputs: Tensor, p: Tensor, gates: Tensor, n: Tensor,
    w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, compute = outputs.dtype, compute_dtype(outputs)
    schedule = Schedule(lengths, *outputs.shape[:2], reverse)
    by_time = (schedule.sort(tensor, 1).to(compute) for tensor in (grad_outputs, gates_x, outputs))
    by_sequence = (schedule.sort(tensor, 0).to(compute) for tensor in (grad_h, h0))
    w, v, bias = (tensor.to(compute) for tensor in (w, v, bias))
    with torch.autocast("cpu", enabled=False):
        grad_x, *others, grad_h0 = _run_backward(schedule, *by_time, *by_sequence, w, v, bias)
    grad_x, grad_h0 = schedule.unsort(grad_x, 1), schedule.unsort(grad_h0, 0)
    return tuple(grad.to(dtype) for grad in (grad_x, *others, grad_h0))


def _run_backward(
    schedule: Schedule, grad_outputs: Tensor, gates_x: Tensor, outputs: Tensor, grad_h: Tensor, h0: Tensor,
    w: Tensor, v: Tensor, bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Chunks of time: the gates again, coefficients of dh, the loop over the steps, and what needs no loop."""
    hidden, rank = v.shape
    grad_x, grad_p = schedule.buffer(v, 3 * hidden), schedule.buffer(v, rank)
    w_bias, v_t, dh = torch.cat((w, bias[:, None]), 1), v.t(), grad_h.clone()
    grad_w_bias = torch.zeros_like(w_bias)
    size = schedule.chunk(hidden)
    p_1 = with_ones((size, schedule.batch, rank), v)
    gates, a, a_n, dhs = (v.new_empty(size, schedule.batch, width * hidden) for width in (3, 3, 1, 1))
    a_by_gate, z = a.unflatten(2, (3, hidden)), gates[..., hidden : 2 * hidden]
    rows = (grad_outputs, grad_x.unflatten(2, (3, hidden)), grad_x, grad_p)
    steps = list(zip(*(schedule.rows(tensor) for tensor in rows), strict=True))
    for begin, end in schedule.chunks(hidden):
        span = slice(0, end - begin)
        previous, p_flat = schedule.previous_chunk(outputs, h0, begin, end), p_1[span].flatten(0, 1)
        torch.mm(previous.flatten(0, 1), v, out=p_flat[:, :rank])
        torch.mm(p_flat, w_bias.t(), out=gates[span].flatten(0, 1))
        _coefficients(a[span], a_n[span], gates[span], gates_x[begin:end], previous)
        for time in schedule.backward_times(begin, end):
            grad, grad_gates, grad_flat, grad_p_t = steps[time]
            count, k = len(grad), time - begin
            dh_t = torch.add(dh[:count], grad, out=dhs[k, :count])
            torch.mul(a_by_gate[k, :count], dh_t.unsqueeze(1), out=grad_gates)
            torch.mm(grad_flat, w, out=grad_p_t)
            torch.mul(dh_t, z[k, :count], out=dh[:count]).addmm_(grad_p_t, v_t)
        grad_w_bias.addmm_(grad_x[begin:end].flatten(0, 1).t(), p_flat)
        torch.mul(dhs[span], a_n[span], out=grad_x[begin:end, :, 2 * hidden :])
        schedule.blank(grad_x[begin:end], begin)
    grad_v_ = grad_v(outputs, h0, grad_p, schedule.lengths, schedule.reverse)
    return grad_x, grad_w_bias[:, :-1].contiguous(), grad_v_, grad_w_bias[:, -1].clone(), dh


def _coefficients(a: Tensor, a_n: Tensor, gates: Tensor, gates_x: Tensor, previous: Tensor) -> None:
    """What dh is multiplied by: a for the gradients of R h + bias (r | z | n), a_n for that of gates_x's n.

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


# ---- Triton implementation ----------------------------------------------------------------------------------------


def _forward_triton(*arguments: Tensor | bool | None) -> tuple[Tensor, ...]:
    from str_triton.ops.low_rank_triton import gru_forward

    return gru_forward(*arguments)


def _backward_triton(
    grad_outputs: Tensor, grad_h: Tensor, gates_x: Tensor, outputs: Tensor, p: Tensor, gates: Tensor, n: Tensor,
    w: Tensor, v: Tensor, bias: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from str_triton.ops.low_rank_triton import gru_backward

    return gru_backward(grad_outputs, grad_h, outputs, p, gates, n, w, v, h0, lengths, reverse)


# ---- registration -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("str_triton", "FRAGMENT")
_LIBRARY.define(
    "low_rank_gru(Tensor gates_x, Tensor w, Tensor v, Tensor bias, Tensor h0, Tensor? lengths, bool reverse, bool save)"
    " -> (Tensor outputs, Tensor h, Tensor p, Tensor gates, Tensor n)"
)
_LIBRARY.define(
    "low_rank_gru_backward(Tensor grad_outputs, Tensor grad_h, Tensor gates_x, Tensor outputs, Tensor p, Tensor gates, "
    "Tensor n, Tensor w, Tensor v, Tensor bias, Tensor h0, Tensor? lengths, bool reverse)"
    " -> (Tensor grad_gates_x, Tensor grad_w, Tensor grad_v, Tensor grad_bias, Tensor grad_h0)"
)
_LIBRARY.impl("low_rank_gru", _forward, "CPU")
_LIBRARY.impl("low_rank_gru", _forward_triton, "CUDA")
_LIBRARY.impl("low_rank_gru_backward", _backward, "CPU")
_LIBRARY.impl("low_rank_gru_backward", _backward_triton, "CUDA")


@torch.library.register_fake("str_triton::low_rank_gru")
def _(gates_x, w, v, bias, h0, lengths, reverse, save):
    steps, batch, _ = gates_x.shape
    hidden, rank = v.shape
    saved = [gates_x.new_empty(saved_shape(gates_x, width, save)) for width in (rank, 3 * hidden, hidden)]
    return gates_x.new_empty(steps, batch, hidden), gates_x.new_empty(batch, hidden), *saved


@torch.library.register_fake("str_triton::low_rank_gru_backward")
def _(grad_outputs, grad_h, gates_x, outputs, p, gates, n, w, v, bias, h0, lengths, reverse):
    new = outputs.new_empty
    return new(*outputs.shape[:2], len(w)), new(w.shape), new(v.shape), new(bias.shape), new(h0.shape)


# ---- autograd -----------------------------------------------------------------------------------------------------


class _LowRankGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_x, w, v, bias, h0, lengths, reverse):
        outputs, h, p, gates, n = torch.ops.str_triton.low_rank_gru(gates_x, w, v, bias, h0, lengths, reverse, True)
        ctx.save_for_backward(kept(gates_x), outputs, p, gates, n, w, v, bias, h0, lengths)
        ctx.reverse = reverse
        return outputs, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs, grad_h):
        grads = torch.ops.str_triton.low_rank_gru_backward(
            grad_outputs.contiguous(), grad_h.contiguous(), *ctx.saved_tensors, ctx.reverse
        )
        return *grads, None, None


# ---- public function ----------------------------------------------------------------------------------------------


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
) -> tuple[Tensor, Tensor]:
    """A GRU over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With gates_x_t = (x_r | x_z | x_n), R h + bias = (R_r h + b_r | R_z h + b_z | R_n h + b_n), h from the step before:

        r = sigmoid(x_r + R_r h + b_r)
        z = sigmoid(x_z + R_z h + b_z)
        n = tanh(x_n + r (R_n h + b_n))
        h' = (1 - z) n + z h

    which are torch.nn.GRU's equations, gates in its order (r, z, n). Arithmetic is float64 if gates_x is, else
    float32, under autocast too; on a GPU float32 products run in TF32 if `torch.backends.cuda.matmul.fp32_precision` is
    "tf32". NaN at a step makes its sequence NaN from there on. The same inputs give the same bits.

    Args:
        gates_x: [T, B, 3 H], the input's part of the gates at all steps, torch's input bias b_ih included. float16,
            bfloat16, float32 or float64. T is at least 1.
        u: [3 H, r], rows in the order of the gates.
        m: [r], the spectrum as it applies: already thresholded.
        v: [H, r].
        bias: [3 H], torch's recurrent bias b_hh; None for none.
        h0: [B, H], the state before each sequence's first step, in gates_x's dtype.
        lengths: int64 [B], each sequence's number of steps, 1 to T, in any order, on the CPU or gates_x's device;
            None if all are T. What lies behind a sequence's end is not read.
        reverse: run from each sequence's last step to its first. Outputs stay at their own time index.

    u, m, v and bias may have other dtypes of these four; u m, v and bias are rounded to gates_x's.

    Returns:
        outputs [T, B, H], the state after every step, 0 behind a sequence's end, and h [B, H], the state after each
        sequence's last processed step. Differentiable once with respect to every tensor but lengths.

    Raises:
        TypeError: an argument that is no tensor of one of these dtypes; h0 of another dtype than gates_x; lengths of
            another dtype than int64.
        ValueError: shapes that do not fit one another, no time step, tensors on different devices, lengths outside 1
            to T (checked where that does not wait for a GPU).

    Source: Cho et al., EMNLP 2014 (arXiv 1406.1078), in torch's variant; Kusupati et al., ICML 2020 (arXiv
    2002.03231), section 3.3.
    """
    check(gates_x, {"u": u, "m": m, "v": v}, {"bias": bias}, {"h0": h0}, lengths, gates=3)
    gates_x, w, v = prepare(gates_x, u, m, v)
    bias = gates_x.new_zeros(len(w)) if bias is None else bias.to(gates_x.dtype).contiguous()
    arguments = gates_x, w, v, bias, h0.contiguous(), lengths, reverse
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments[:5]):
        return _LowRankGRU.apply(*arguments)
    outputs, h, *_ = torch.ops.str_triton.low_rank_gru(*arguments, False)
    return outputs, h
