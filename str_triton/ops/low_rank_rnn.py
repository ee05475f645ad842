"""The low-rank recurrent ops: one registered op for every cell, its autograd Function, and the public functions' part.

The registered op sees one dtype and contiguous tensors: w = u m, so that R h = w (v^T h), and v, both in gates_x's
dtype; the biases in one tensor; the sigmoids of the scalars. It returns outputs, the last states, and p and saved, what
the backward needs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops import low_rank_cpu, low_rank_gpu
from str_triton.ops.low_rank_cell import CELLS, Cell
from str_triton.ops.low_rank_checks import check, check_precision
from str_triton.ops.low_rank_plan import saved_shape
from str_triton.ops.registration import differentiable, function, op
from str_triton.ops.tensors import compute_dtype


@op(
    "low_rank_rnn(str cell, Tensor gates_x, Tensor w, Tensor v, Tensor bias, Tensor scale, Tensor[] states, "
    "Tensor? lengths, bool reverse, bool save, str? precision, bool native=False) -> Tensor[]",
    low_rank_cpu.forward,
    low_rank_gpu.forward,
)
def _(cell, gates_x, w, v, bias, scale, states, lengths, reverse, save, *options):
    steps, batch, _ = gates_x.shape
    hidden, rank = v.shape
    outputs, finals = gates_x.new_empty(steps, batch, hidden), [torch.empty_like(state) for state in states]
    p, saved = (gates_x.new_empty(0) for _ in range(2))
    if save and gates_x.device.type != "cpu":
        p = gates_x.new_empty(steps, batch, rank)
        saved = gates_x.new_empty(saved_shape(CELLS[cell], steps, batch, hidden))
    elif save and len(states) > 1:
        saved = torch.empty_like(outputs)
    elif save and CELLS[cell].kept:
        saved = outputs.new_empty(steps, batch, CELLS[cell].kept * hidden, dtype=compute_dtype(outputs))
    return [outputs, *finals, p, saved]


@op(
    "low_rank_rnn_backward(str cell, Tensor grad_outputs, Tensor[] grad_states, Tensor? gates_x, Tensor outputs, "
    "Tensor p, Tensor saved, Tensor w, Tensor v, Tensor bias, Tensor scale, Tensor[] states, Tensor? lengths, "
    "bool reverse, str? precision, bool native=False) -> Tensor[]",
    low_rank_cpu.backward,
    low_rank_gpu.backward,
)
def _(cell, grad_outputs, grad_states, gates_x, outputs, p, saved, w, v, bias, scale, states, lengths, *options):
    grad_x = outputs.new_empty(*outputs.shape[:2], CELLS[cell].gates * outputs.shape[2])
    return [grad_x, *(torch.empty_like(tensor) for tensor in (w, v, bias, scale, *states))]


@function
class _LowRankRNN(torch.autograd.Function):
    """Outputs and the last states, and what their backward needs."""

    @staticmethod
    def forward(cell, lengths, reverse, precision, native, gates_x, w, v, bias, scale, *states):
        arguments = (cell, gates_x, w, v, bias, scale, list(states), lengths, reverse, True, precision, native)
        return tuple(torch.ops.str_triton.low_rank_rnn(*arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, lengths, ctx.reverse, ctx.precision, ctx.native, gates_x, *others = inputs
        outputs, *_, p, saved = output
        ctx.mark_non_differentiable(p, saved)
        ctx.set_materialize_grads(False)  # otherwise p and saved get gradients, too
        # A GPU's forward saves the gates, so its backward does not need gates_x.
        gates_x = gates_x if gates_x.device.type == "cpu" else None
        ctx.save_for_backward(lengths, gates_x, outputs, p, saved, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs, *grads):
        lengths, gates_x, outputs, p, saved, w, v, bias, scale, *states = ctx.saved_tensors
        grad_outputs = torch.zeros_like(outputs) if grad_outputs is None else grad_outputs.contiguous()
        grad_states = [
            torch.zeros_like(state) if grad is None else grad.contiguous()
            for grad, state in zip(grads[:-2], states, strict=True)
        ]
        grads = torch.ops.str_triton.low_rank_rnn_backward(
            ctx.cell, grad_outputs, grad_states, gates_x, outputs, p, saved, w, v, bias, scale, states, lengths,
            ctx.reverse, ctx.precision, ctx.native,
        )  # fmt: skip
        return None, None, None, None, None, *grads


def _differentiable(cell, gates_x, w, v, bias, scale, states, lengths, reverse, save, precision, native=False):
    return list(_LowRankRNN.apply(cell, lengths, reverse, precision, native, gates_x, w, v, bias, scale, *states))


differentiable("low_rank_rnn", _differentiable)


def run(
    cell: Cell, gates_x: Tensor, u: Tensor, m: Tensor, v: Tensor, biases: dict[str, Tensor | None],
    scalars: dict[str, Tensor], states: dict[str, Tensor], lengths: Tensor | None, reverse: bool, precision: str | None,
    native: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Check the arguments of a public function, by their names, and return outputs and the last states."""
    check(gates_x, {"u": u, "m": m, "v": v}, biases, states, scalars, lengths, cell.gates)
    check_precision(precision)
    gates_x, dtype = gates_x.contiguous(), gates_x.dtype
    w, v = (u * m).to(dtype).contiguous(), v.to(dtype).contiguous()
    width = cell.bias_blocks * len(v) // len(biases)
    parts = [gates_x.new_zeros(width) if bias is None else bias.to(dtype) for bias in biases.values()]
    bias = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    compute = compute_dtype(gates_x)
    scale = gates_x.new_empty(0, dtype=compute)
    if scalars:
        scale = torch.cat([raw.reshape(1).to(compute).sigmoid() for raw in scalars.values()])
    tensors = gates_x, w, v, bias, scale, *(state.contiguous() for state in states.values())
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if needs_grad and not torch.compiler.is_exporting():  # torch.export keeps the op, which has a gradient of its own.
        results = _LowRankRNN.apply(cell.name, lengths, reverse, precision, native, *tensors)
    else:
        arguments = (cell.name, *tensors[:5], list(tensors[5:]), lengths, reverse, False, precision, native)
        results = torch.ops.str_triton.low_rank_rnn(*arguments)
    return results[0], list(results[1:-2])
