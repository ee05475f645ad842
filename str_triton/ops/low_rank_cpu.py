"""The low-rank time loops on the CPU, for every cell: what surrounds a cell's own steps, forward and backward.

With `native`, float32 steps run in C (str_triton/native).
"""

import ctypes

import torch
from torch import Tensor

from str_triton.native import recurrent as loops
from str_triton.ops.low_rank_cell import CELLS, Backward, Cell, grad_v
from str_triton.ops.schedule import Schedule, last_state, with_ones
from str_triton.ops.tensors import compute_dtype


def forward(
    cell: str, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, states: list[Tensor],
    lengths: Tensor | None, reverse: bool, save: bool, precision: str | None, native: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return outputs, the last states, and for the backward nothing (p) and saved: c after every step, or gates."""
    dtype, compute, of = gates_x.dtype, compute_dtype(gates_x), CELLS[cell]
    schedule = Schedule(lengths, gates_x.shape[0], gates_x.shape[1], reverse)
    gates_x, states = schedule.sort(gates_x, 1).to(compute), [schedule.sort(state, 0).to(compute) for state in states]
    w, v, bias = (tensor.to(compute) for tensor in (w, v, bias))
    nothing, kernels = gates_x.new_empty(0, dtype=dtype), _kernels(native, cell, v)
    if kernels is not None:
        width = (of.kept or len(states) - 1) * len(v) if save else 0
        keep = schedule.buffer(v, width) if width else None
        results = loops.forward(kernels, cell, gates_x, w, v, bias, scale, states, reverse, schedule.running, keep)
        every, last = results[: schedule.steps], results[schedule.steps :]
        saved = nothing.clone() if keep is None else keep if of.kept else keep.to(dtype)
        ends = [schedule.unsort(state, 0).to(dtype, copy=True) for state in last]
        return [schedule.unsort(every, 1).to(dtype), *ends, nothing, saved]
    new = schedule.buffer if save else schedule.scratch
    buffers = [schedule.buffer(v, len(v)), *(new(v, len(v)) for _ in states[1:])]
    kept = [new(v, of.kept * len(v))] if of.kept else []
    with torch.autocast("cpu", enabled=False):
        inputs, step = of.forward(schedule, gates_x, w, v, bias, scale, *kept)
        written = [schedule.rows(buffer) for buffer in buffers]
        rows = list(zip(*(schedule.rows(tensor) for tensor in inputs), *written, strict=True))
        previous, (hs, *cs), (h0, *c0) = schedule.previous, written, states
        if cs:
            for time in schedule.times:
                step(previous(hs, h0, time), previous(cs[0], c0[0], time), *rows[time])
        else:  # Steps are short: a list of one state would cost 5 % of a sequence's time.
            for time in schedule.times:
                step(previous(hs, h0, time), *rows[time])
    outputs, *cells = buffers
    finals = [last_state(x, schedule.lengths, reverse) if len(x) == schedule.steps else x[0] for x in buffers]
    kept = [cell.to(dtype) for cell in cells] or kept
    saved = kept[0] if save and kept else nothing.clone()  # in the schedule's order; gates in the arithmetic's dtype
    return [schedule.unsort(outputs, 1).to(dtype), *(schedule.unsort(h, 0).to(dtype) for h in finals), nothing, saved]


def backward(
    cell: str, grad_outputs: Tensor, grad_states: list[Tensor], gates_x: Tensor, outputs: Tensor, p: Tensor,
    saved: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, states: list[Tensor],
    lengths: Tensor | None, reverse: bool, precision: str | None, native: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of gates_x, w, v, bias, scale and the states."""
    dtype, compute, of = outputs.dtype, compute_dtype(outputs), CELLS[cell]
    schedule = Schedule(lengths, outputs.shape[0], outputs.shape[1], reverse)
    grad_outputs, gates_x, outputs = (schedule.sort(x, 1).to(compute) for x in (grad_outputs, gates_x, outputs))
    states, grad_states = ([schedule.sort(x, 0).to(compute) for x in xs] for xs in (states, grad_states))
    saved, w, v, bias = (tensor.to(compute) for tensor in (saved, w, v, bias))
    (hidden, rank), size = v.shape, schedule.chunk(len(v))
    run = Backward(
        schedule, size, gates_x, grad_outputs, [grad.clone() for grad in grad_states], saved, states,
        w, v, bias, scale,
        q=v.new_empty(0 if of.kept else size, schedule.batch, of.gates * hidden),
        grad_x=schedule.buffer(v, of.gates * hidden),
        grad_p=schedule.buffer(v, rank),
        grad_bias=v.new_zeros(of.bias_blocks, hidden),
        grad_scale=v.new_zeros(of.scalars),
    )  # fmt: skip
    with torch.autocast("cpu", enabled=False):
        grad_w, grad_bias = _walk(of, run, outputs, states[0], _kernels(native, cell, v))
        grad_v_ = grad_v(outputs, states[0], run.grad_p, schedule.lengths, reverse)
    grads = [schedule.unsort(run.grad_x, 1), grad_w, grad_v_, grad_bias]
    grads = [*(grad.to(dtype) for grad in grads), run.grad_scale.to(scale.dtype)]
    return grads + [schedule.unsort(grad, 0).to(dtype) for grad in run.grad_states]


def _kernels(native: bool, cell: str, v: Tensor) -> ctypes.CDLL | None:
    """Return the kernels in C if they are asked for and can run a cell's steps with this factor."""
    return loops.kernels(cell) if native and v.dtype == torch.float32 and v.numel() > 0 else None


def _walk(cell: Cell, run: Backward, outputs: Tensor, h0: Tensor, kernels: ctypes.CDLL | None) -> tuple[Tensor, Tensor]:
    """Write the gradients in `run`, chunk of time by chunk, and return those of w and the bias.

    A chunk computes R h again, then the coefficients, then the loop over the steps, then all that needs no loop.
    """
    schedule, w, v, bias, rank, has_ones = run.schedule, run.w, run.v, run.bias, run.v.shape[1], cell.biases is None
    factor = torch.cat((w, bias[:, None]), 1) if has_ones else w
    grad_factor = torch.zeros_like(factor)
    p_shape = run.size, schedule.batch, rank
    p = with_ones(p_shape, v) if has_ones else v.new_empty(p_shape)
    buffers, begin_chunk, step, end_chunk, factors = cell.backward(run)
    walk = None if kernels is None else loops.Walk(kernels, w, v)
    rows = (
        []
        if walk
        else list(zip(*(schedule.rows(buffer) for buffer in (run.grad_outputs, *buffers, run.grad_p)), strict=True))
    )
    for begin, end in schedule.chunks(len(v)):
        span = slice(0, end - begin)
        previous, p_flat = schedule.previous_chunk(outputs, h0, begin, end), p[span].flatten(0, 1)
        torch.mm(previous.flatten(0, 1), v, out=p_flat[:, :rank])
        if not cell.kept:
            torch.mm(p_flat, factor.t(), out=run.q[span].flatten(0, 1))
        begin_chunk(span, begin, end, previous)
        if walk:
            parts = {"grad": run.grad_outputs, "gates_grad": run.grad_x, "p_grad": run.grad_p}
            parts = {name: part[begin:end] for name, part in parts.items()} | factors(span, begin, end)
            counts = None if schedule.running is None else schedule.running[begin:end]
            walk.run(falls=not schedule.reverse, counts=counts, dh=run.grad_states[0], **parts)
        else:
            for time in schedule.backward_times(begin, end):
                step(time - begin, *rows[time])
        grad_factor.addmm_(run.grad_x[begin:end].flatten(0, 1).t(), p_flat)
        end_chunk(span, begin, end)
    if has_ones:
        return grad_factor[:, :-1].contiguous(), grad_factor[:, -1].clone()
    return grad_factor, run.grad_bias.flatten()
