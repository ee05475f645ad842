"""The low-rank time loops on the CPU, for every cell: what surrounds a cell's own steps, forward and backward."""

import torch
from torch import Tensor

from str_triton.ops.low_rank_cell import CELLS, Backward, Cell, grad_v
from str_triton.ops.schedule import Schedule, with_ones
from str_triton.ops.tensors import compute_dtype


def forward(
    cell: str, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, states: list[Tensor],
    lengths: Tensor | None, reverse: bool, save: bool, precision: str | None,
) -> list[Tensor]:  # fmt: skip
    """Return outputs, the last states, and for the backward nothing (p) and saved: c after every step, or gates."""
    dtype, compute, of = gates_x.dtype, compute_dtype(gates_x), CELLS[cell]
    schedule = Schedule(lengths, gates_x.shape[0], gates_x.shape[1], reverse)
    gates_x, states = schedule.sort(gates_x, 1).to(compute), [schedule.sort(state, 0).to(compute) for state in states]
    w, v, bias = (tensor.to(compute) for tensor in (w, v, bias))
    buffers = [schedule.buffer(v, len(v))]
    buffers += [schedule.buffer(v, len(v)) if save else schedule.scratch(v, len(v)) for _ in states[1:]]
    with torch.autocast("cpu", enabled=False):
        kept = []
        if of.kept:
            width = of.kept * len(v)
            kept = [schedule.buffer(v, width) if save else schedule.scratch(v, width)]
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
    finals = [schedule.last(buffer) if len(buffer) == schedule.steps else buffer[0] for buffer in buffers]
    nothing = gates_x.new_empty(0, dtype=dtype)
    saved = nothing.clone()
    if save and (cells or kept):  # in the schedule's order; gates in the dtype of the arithmetic
        saved = cells[0].to(dtype) if cells else kept[0]
    return [schedule.unsort(outputs, 1).to(dtype), *(schedule.unsort(h, 0).to(dtype) for h in finals), nothing, saved]


def backward(
    cell: str, grad_outputs: Tensor, grad_states: list[Tensor], gates_x: Tensor, outputs: Tensor, p: Tensor,
    saved: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, states: list[Tensor],
    lengths: Tensor | None, reverse: bool, precision: str | None,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of gates_x, w, v, bias, scale and the states."""
    dtype, compute = outputs.dtype, compute_dtype(outputs)
    schedule = Schedule(lengths, outputs.shape[0], outputs.shape[1], reverse)
    grad_outputs, gates_x, outputs = (schedule.sort(x, 1).to(compute) for x in (grad_outputs, gates_x, outputs))
    states, grad_states = ([schedule.sort(x, 0).to(compute) for x in xs] for xs in (states, grad_states))
    saved, w, v, bias = (tensor.to(compute) for tensor in (saved, w, v, bias))
    with torch.autocast("cpu", enabled=False):
        grad_x, *others, grad_scale, grad_states = _run_backward(
            CELLS[cell], schedule, grad_outputs, gates_x, outputs, saved, grad_states, states, w, v, bias, scale
        )
    grads = [schedule.unsort(grad_x, 1).to(dtype), *(grad.to(dtype) for grad in others), grad_scale.to(scale.dtype)]
    return grads + [schedule.unsort(grad, 0).to(dtype) for grad in grad_states]


def _run_backward(
    cell: Cell, schedule: Schedule, grad_outputs: Tensor, gates_x: Tensor, outputs: Tensor, cells: Tensor,
    grad_states: list[Tensor], states: list[Tensor], w: Tensor, v: Tensor, bias: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Walk through chunks of time: R h again, coefficients, the loop over the steps, and what needs no loop."""
    hidden, rank = v.shape
    size, has_ones = schedule.chunk(hidden), cell.biases is None
    factor = torch.cat((w, bias[:, None]), 1) if has_ones else w
    grad_factor = torch.zeros_like(factor)
    p_shape = size, schedule.batch, rank
    p = with_ones(p_shape, v) if has_ones else v.new_empty(p_shape)
    run = Backward(
        schedule, size, gates_x, grad_outputs, [grad.clone() for grad in grad_states], cells, states,
        w, v, bias, scale,
        q=v.new_empty(0 if cell.kept else size, schedule.batch, cell.gates * hidden),
        grad_x=schedule.buffer(v, cell.gates * hidden),
        grad_p=schedule.buffer(v, rank),
        grad_bias=v.new_zeros(cell.bias_blocks, hidden),
        grad_scale=v.new_zeros(cell.scalars),
    )  # fmt: skip
    buffers, begin_chunk, step, end_chunk = cell.backward(run)
    rows = list(zip(*(schedule.rows(buffer) for buffer in (grad_outputs, *buffers, run.grad_p)), strict=True))
    for begin, end in schedule.chunks(hidden):
        span = slice(0, end - begin)
        previous, p_flat = schedule.previous_chunk(outputs, states[0], begin, end), p[span].flatten(0, 1)
        torch.mm(previous.flatten(0, 1), v, out=p_flat[:, :rank])
        if not cell.kept:
            torch.mm(p_flat, factor.t(), out=run.q[span].flatten(0, 1))
        begin_chunk(span, begin, end, previous)
        for time in schedule.backward_times(begin, end):
            step(time - begin, *rows[time])
        grad_factor.addmm_(run.grad_x[begin:end].flatten(0, 1).t(), p_flat)
        end_chunk(span, begin, end)
    grad_w, grad_bias = (grad_factor[:, :-1].contiguous(), grad_factor[:, -1].clone()) if has_ones else (
        grad_factor, run.grad_bias.flatten())  # fmt: skip
    grad_v_ = grad_v(outputs, states[0], run.grad_p, schedule.lengths, schedule.reverse)
    return run.grad_x, grad_w, grad_v_, grad_bias, run.grad_scale, run.grad_states
