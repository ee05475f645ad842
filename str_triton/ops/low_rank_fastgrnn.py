"""The time loop of a FastGRNN whose recurrent matrix is R = u diag(m) v^T, forward and backward in one op each.

Source: Kusupati et al., "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent Neural Network",
NeurIPS 2018; the low-rank form with a learned rank: Kusupati et al., ICML 2020, section 3.3.
Derivation of the backward: docs/derivations.md. Kernels: kernels/low_rank_fastgrnn.py.

The registered ops see both biases in one tensor, (bias_gate | bias_update), and scale = (sigmoid(zeta), sigmoid(nu)).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops.schedule import Schedule
from str_triton.ops.time_loop import check, compute_dtype, grad_v, kept, prepare, saved_shape

# ---- CPU implementation -------------------------------------------------------------------------------------------


def _forward(
    gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, h0: Tensor,
    lengths: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, compute = gates_x.dtype, compute_dtype(gates_x)
    schedule = Schedule(lengths, *gates_x.shape[:2], reverse)
    gates_x, h0 = schedule.sort(gates_x, 1).to(compute), schedule.sort(h0, 0).to(compute)
    w, v, bias = (tensor.to(compute) for tensor in (w, v, bias))
    with torch.autocast("cpu", enabled=False):
        outputs = _run(schedule, gates_x, w, v, bias, scale, h0)
    h = schedule.unsort(schedule.last(outputs), 0).to(dtype)
    p, gates = (gates_x.new_empty(0, dtype=dtype) for _ in range(2))
    return schedule.unsort(outputs, 1).to(dtype), h, p, gates


def _run(schedule: Schedule, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, h0: Tensor) -> Tensor:
    """The loop itself."""
    hidden, rank = v.shape
    w_t, bias, (zeta, nu) = w.t(), bias.unflatten(0, (2, hidden)), scale.tolist()
    outputs = schedule.buffer(gates_x, hidden)
    p, a, gates = schedule.scratch(v, rank), schedule.scratch(v, hidden), schedule.scratch(v, 2, hidden)
    tensors = gates_x, p, a, a.unsqueeze(2), gates, *gates.unbind(2), outputs
    steps = list(zip(*(schedule.rows(tensor) for tensor in tensors), strict=True))
    states = [step[-1] for step in steps]
    for time in schedule.times:
        x, p_t, a_t, a_both, gates_t, z, c, state = steps[time]
        previous = schedule.previous(states, h0, time)
        torch.mm(previous, v, out=p_t)
        torch.addmm(x, p_t, w_t, out=a_t)
        torch.add(a_both, bias, out=gates_t)
        z.sigmoid_()
        c.tanh_()
        # h' = (zeta (1 - z) + nu) c + z h = (zeta + nu) c + z (h - zeta c)
        torch.sub(previous, c, alpha=zeta, out=a_t)
        torch.mul(c, zeta + nu, out=state).addcmul_(z, a_t)
    return outputs


def _backward(
    grad_outputs: Tensor, grad_h: Tensor, gates_x: Tensor, outputs: Tensor, p: Tensor, gates: Tensor,
    w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, compute = outputs.dtype, compute_dtype(outputs)
    schedule = Schedule(lengths, *outputs.shape[:2], reverse)
    by_time = (schedule.sort(tensor, 1).to(compute) for tensor in (grad_outputs, gates_x, outputs))
    by_sequence = (schedule.sort(tensor, 0).to(compute) for tensor in (grad_h, h0))
    w, v, bias = (tensor.to(compute) for tensor in (w, v, bias))
    with torch.autocast("cpu", enabled=False):
        grads = _run_backward(schedule, *by_time, *by_sequence, w, v, bias, scale)
    grad_x, *others, grad_scale, grad_h0 = grads
    grad_x, grad_h0 = schedule.unsort(grad_x, 1), schedule.unsort(grad_h0, 0)
    return *(grad.to(dtype) for grad in (grad_x, *others)), grad_scale.to(scale.dtype), grad_h0.to(dtype)


def _run_backward(
    schedule: Schedule, grad_outputs: Tensor, gates_x: Tensor, outputs: Tensor, grad_h: Tensor, h0: Tensor,
    w: Tensor, v: Tensor, bias: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Chunks of time: the gates again, coefficients of dh, the loop over the steps, and what needs no loop."""
    hidden, rank = v.shape
    grad_x, grad_p, v_t, dh = schedule.buffer(v, hidden), schedule.buffer(v, rank), v.t(), grad_h.clone()
    grad_w, grad_bias, grad_scale = torch.zeros_like(w), v.new_zeros(2, hidden), v.new_zeros(2)
    size = schedule.chunk(hidden)
    x, a, a_z, dhs = (v.new_empty(size, schedule.batch, hidden) for _ in range(4))
    gates, p = v.new_empty(size, schedule.batch, 2, hidden), v.new_empty(size, schedule.batch, rank)
    z = gates[:, :, 0]
    steps = list(zip(*(schedule.rows(tensor) for tensor in (grad_outputs, grad_x, grad_p)), strict=True))
    for begin, end in schedule.chunks(hidden):
        span = slice(0, end - begin)
        previous, p_flat = schedule.previous_chunk(outputs, h0, begin, end), p[span].flatten(0, 1)
        torch.mm(previous.flatten(0, 1), v, out=p_flat)
        torch.mm(p_flat, w.t(), out=x[span].flatten(0, 1))
        x[span].add_(gates_x[begin:end])
        schedule.blank(x[span], begin)
        torch.add(x[span].unsqueeze(2), bias.unflatten(0, (2, hidden)), out=gates[span])
        _coefficients(a[span], a_z[span], gates[span], previous, scale)
        for time in schedule.backward_times(begin, end):
            grad, grad_x_t, grad_p_t = steps[time]
            count, k = len(grad), time - begin
            dh_t = torch.add(dh[:count], grad, out=dhs[k, :count])
            torch.mul(a[k, :count], dh_t, out=grad_x_t)
            torch.mm(grad_x_t, w, out=grad_p_t)
            torch.mul(dh_t, z[k, :count], out=dh[:count]).addmm_(grad_p_t, v_t)
        schedule.blank(dhs[span], begin)
        flat = grad_x[begin:end].flatten(0, 1)
        grad_w.addmm_(flat.t(), p_flat)
        grad_z = a_z[span].mul_(dhs[span]).flatten(0, 1).sum(0)
        grad_bias += torch.stack((grad_z, flat.sum(0) - grad_z))
        dh_c = dhs[span].mul_(gates[span, :, 1])
        grad_nu = dh_c.sum()
        grad_scale += torch.stack((grad_nu - dh_c.mul_(z[span]).sum(), grad_nu))
    grad_v_ = grad_v(outputs, h0, grad_p, schedule.lengths, schedule.reverse)
    return grad_x, grad_w, grad_v_, grad_bias.flatten(), grad_scale, dh


def _coefficients(a: Tensor, a_z: Tensor, gates: Tensor, previous: Tensor, scale: Tensor) -> None:
    """What dh is multiplied by: a_z for the gradient of z before its activation, a for that plus c's.

        a_z = (h_prev - zeta c) z (1 - z)        a = a_z + (zeta (1 - z) + nu)(1 - c^2)

    gates comes as gates_x + R h + (bias_gate | bias_update) and becomes (z | c).
    """
    (z, c), (zeta, nu) = gates.unbind(2), scale.tolist()
    z.sigmoid_()
    c.tanh_()
    torch.sub(previous, c, alpha=zeta, out=a_z)
    torch.ops.aten.sigmoid_backward.grad_input(a_z, z, grad_input=a_z)
    torch.mul(z, -zeta, out=a).add_(zeta + nu)
    torch.ops.aten.tanh_backward.grad_input(a, c, grad_input=a)
    a += a_z


# ---- Triton implementation ----------------------------------------------------------------------------------------


def _forward_triton(*arguments: Tensor | bool | None) -> tuple[Tensor, ...]:
    from str_triton.ops.low_rank_triton import fastgrnn_forward

    return fastgrnn_forward(*arguments)


def _backward_triton(
    grad_outputs: Tensor, grad_h: Tensor, gates_x: Tensor, outputs: Tensor, p: Tensor, gates: Tensor,
    w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from str_triton.ops.low_rank_triton import fastgrnn_backward

    return fastgrnn_backward(grad_outputs, grad_h, outputs, p, gates, w, v, scale, h0, lengths, reverse)


# ---- registration -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("str_triton", "FRAGMENT")
_LIBRARY.define(
    "low_rank_fastgrnn(Tensor gates_x, Tensor w, Tensor v, Tensor bias, Tensor scale, Tensor h0, Tensor? lengths, "
    "bool reverse, bool save)"
    " -> (Tensor outputs, Tensor h, Tensor p, Tensor gates)"
)
_LIBRARY.define(
    "low_rank_fastgrnn_backward(Tensor grad_outputs, Tensor grad_h, Tensor gates_x, Tensor outputs, Tensor p, "
    "Tensor gates, Tensor w, Tensor v, Tensor bias, Tensor scale, Tensor h0, Tensor? lengths, bool reverse)"
    " -> (Tensor grad_gates_x, Tensor grad_w, Tensor grad_v, Tensor grad_bias, Tensor grad_scale, Tensor grad_h0)"
)
_LIBRARY.impl("low_rank_fastgrnn", _forward, "CPU")
_LIBRARY.impl("low_rank_fastgrnn", _forward_triton, "CUDA")
_LIBRARY.impl("low_rank_fastgrnn_backward", _backward, "CPU")
_LIBRARY.impl("low_rank_fastgrnn_backward", _backward_triton, "CUDA")


@torch.library.register_fake("str_triton::low_rank_fastgrnn")
def _(gates_x, w, v, bias, scale, h0, lengths, reverse, save):
    steps, batch, hidden = gates_x.shape
    saved = [gates_x.new_empty(saved_shape(gates_x, width, save)) for width in (v.shape[1], 2 * hidden)]
    return gates_x.new_empty(steps, batch, hidden), gates_x.new_empty(batch, hidden), *saved


@torch.library.register_fake("str_triton::low_rank_fastgrnn_backward")
def _(grad_outputs, grad_h, gates_x, outputs, p, gates, w, v, bias, scale, h0, lengths, reverse):
    new = outputs.new_empty
    return *(new(tensor.shape) for tensor in (outputs, w, v, bias)), torch.empty_like(scale), new(h0.shape)


# ---- autograd -----------------------------------------------------------------------------------------------------


class _LowRankFastGRNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_x, w, v, bias, scale, h0, lengths, reverse):
        outputs, h, p, gates = torch.ops.str_triton.low_rank_fastgrnn(
            gates_x, w, v, bias, scale, h0, lengths, reverse, True
        )
        ctx.save_for_backward(kept(gates_x), outputs, p, gates, w, v, bias, scale, h0, lengths)
        ctx.reverse = reverse
        return outputs, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs, grad_h):
        grads = torch.ops.str_triton.low_rank_fastgrnn_backward(
            grad_outputs.contiguous(), grad_h.contiguous(), *ctx.saved_tensors, ctx.reverse
        )
        return *grads, None, None


# ---- public function ----------------------------------------------------------------------------------------------


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
) -> tuple[Tensor, Tensor]:
    """A FastGRNN over all time steps, its recurrent matrix R = u diag(m) v^T applied as u (m (v^T h)).

    With a = gates_x_t + R h, h from the step before:

        z = sigmoid(a + bias_gate)
        c = tanh(a + bias_update)
        h' = (sigmoid(zeta) (1 - z) + sigmoid(nu)) c + z h

    The gate z and the candidate c share both matrices: gates_x and u have H columns and rows, no stack of gates.
    Arithmetic is float64 if gates_x is, else float32, under autocast too; on a GPU float32 products run in TF32 if
    `torch.backends.cuda.matmul.fp32_precision` is "tf32". NaN at a step makes its sequence NaN from there on. The same
    inputs give the same bits.

    Args:
        gates_x: [T, B, H], W x at all steps, no bias in it. float16, bfloat16, float32 or float64. T is at least 1.
        u: [H, r].
        m: [r], the spectrum as it applies: already thresholded.
        v: [H, r].
        bias_gate, bias_update: [H], those of z and c; None for none.
        zeta, nu: one element of any shape, raw: the op applies the sigmoid.
        h0: [B, H], the state before each sequence's first step, in gates_x's dtype.
        lengths: int64 [B], each sequence's number of steps, 1 to T, in any order, on the CPU or gates_x's device;
            None if all are T. What lies behind a sequence's end is not read.
        reverse: run from each sequence's last step to its first. Outputs stay at their own time index.

    u, m, v, biases, zeta and nu may have other dtypes of these four; u m, v and the biases are rounded to gates_x's.

    Returns:
        outputs [T, B, H], the state after every step, 0 behind a sequence's end, and h [B, H], the state after each
        sequence's last processed step. Differentiable once with respect to every tensor but lengths.

    Raises:
        TypeError: an argument that is no tensor of one of these dtypes; h0 of another dtype than gates_x; lengths of
            another dtype than int64.
        ValueError: shapes that do not fit one another, no time step, tensors on different devices, lengths outside 1
            to T (checked where that does not wait for a GPU).

    Source: Kusupati et al., NeurIPS 2018 (arXiv 1901.02358), equations 3 to 5; Kusupati et al., ICML 2020 (arXiv
    2002.03231), section 3.3.
    """
    biases = {"bias_gate": bias_gate, "bias_update": bias_update}
    check(gates_x, {"u": u, "m": m, "v": v, "zeta": zeta, "nu": nu}, biases, {"h0": h0}, lengths, gates=1)
    gates_x, w, v = prepare(gates_x, u, m, v)
    zeros = gates_x.new_zeros(len(w))
    bias = torch.cat([zeros if bias is None else bias.to(gates_x.dtype) for bias in biases.values()])
    scale = torch.cat([raw.reshape(1).to(compute_dtype(gates_x)).sigmoid() for raw in (zeta, nu)])
    arguments = gates_x, w, v, bias, scale, h0.contiguous(), lengths, reverse
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments[:6]):
        return _LowRankFastGRNN.apply(*arguments)
    outputs, h, *_ = torch.ops.str_triton.low_rank_fastgrnn(*arguments, False)
    return outputs, h
