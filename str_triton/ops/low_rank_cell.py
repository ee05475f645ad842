"""The description of a recurrent cell for the low-rank ops: its names and sizes, and its loops on the CPU.

Its kernel functions, `NAME` and `NAME_backward`, are in kernels/low_rank_cells.py. CONTRIBUTING.md says how to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from str_triton.ops.schedule import Schedule

CELLS: dict[str, "Cell"] = {}  # by name; the files in ops/cells fill it


@dataclass(frozen=True)
class Cell:
    """A recurrent cell, whose gates see the state h only as R h = w (v^T h).

    name: as ops, kernels, layers and messages call it.
    gates: blocks of H columns in gates_x, and of H rows in the recurrent matrix.
    forward: the loop on the CPU, (schedule, gates_x, w, v, bias, scale) -> buffers and step. `step` gets the states
        before the step, the buffers' rows at its time, and the rows to write the states to. A cell with `kept` gets one
        more argument, the tensor to keep them in.
    backward: the loop on the CPU, `Backward` -> buffers, begin, step, end and factors. `begin` forms the coefficients
        of a chunk of time, `step` walks, `end` does what needs no loop; see ops/low_rank_cpu.py. In place of `step` the
        loop in C walks with what `factors` returns for a chunk: tensors by their names in native/backward.h.
    kept: blocks of H numbers that the CPU's forward keeps for the backward, which then does not compute R h again.
    saved: blocks of H numbers that a GPU's forward saves at each step and sequence; c, if there is one, is the last.
    extra: whether a GPU's backward writes a block of H besides the gradient of gates_x: the gradient of R h + bias in
        the last gate, where that is not the gradient of gates_x there.
    states: names of the states, h and possibly c.
    biases: blocks of H elements in the bias; None if they are the gates' and are added to R h.
    scalars: elements of `scale`.
    has_dense: whether torch has a kernel for the cell (cuDNN, oneDNN) that can take a formed recurrent matrix.
    """

    name: str
    gates: int
    forward: Callable
    backward: Callable
    saved: int
    kept: int = 0
    extra: bool = True
    states: tuple[str, ...] = ("h",)
    biases: int | None = None
    scalars: int = 0
    has_dense: bool = False

    def __post_init__(self) -> None:
        CELLS[self.name] = self

    @property
    def bias_blocks(self) -> int:
        return self.biases or self.gates


@dataclass
class Backward:
    """The arguments of a cell's backward on the CPU. Tensors are sorted by the schedule, in the arithmetic's dtype."""

    schedule: Schedule
    size: int  # steps in a chunk of time
    gates_x: Tensor
    grad_outputs: Tensor
    grad_states: list[Tensor]  # changed in place, from the gradients of the last states to those of the first
    cells: Tensor  # c after every step, if the cell has one; or what the cell has kept
    states: list[Tensor]  # before each sequence's first step
    w: Tensor
    v: Tensor
    bias: Tensor
    scale: Tensor
    q: Tensor  # [size, batch, gates * hidden]: R h of a chunk, with the bias if the cell adds it there; empty with kept
    grad_x: Tensor
    grad_p: Tensor
    grad_bias: Tensor  # of a cell that does not add its bias to R h
    grad_scale: Tensor

    def chunk(self, width: int) -> Tensor:
        """Make a buffer [size, batch, width * hidden]."""
        return self.v.new_empty(self.size, self.schedule.batch, width * len(self.v))


def coupled_backward(run: Backward, begin: Callable, a: Tensor, a_n: Tensor, keep: Tensor) -> tuple:
    """Return the backward of a cell whose last gate takes R h + bias times another gate, as a GRU's n does.

    `begin` forms the coefficients of a chunk of time. dh times a [size, batch, gates, H] is the gradient of R h + bias,
    dh times a_n that of the last gate's part of gates_x. dh times `keep` reaches the state before without a product.
    """
    hidden, v_t, w, (dh,), dhs = len(run.v), run.v.t(), run.w, run.grad_states, run.chunk(1)

    def step(k, grad, grad_gates, grad_flat, grad_p):
        count = len(grad)
        dh_t = torch.add(dh[:count], grad, out=dhs[k, :count])
        torch.mul(a[k, :count], dh_t.unsqueeze(1), out=grad_gates)
        torch.mm(grad_flat, w, out=grad_p)
        torch.mul(dh_t, keep[k, :count], out=dh[:count]).addmm_(grad_p, v_t)

    def end(span, begin, end):
        torch.mul(dhs[span], a_n[span], out=run.grad_x[begin:end, :, run.grad_x.shape[2] - hidden :])
        run.schedule.blank(run.grad_x[begin:end], begin)

    def factors(span, begin, end):
        return {"a": a[span], "keep": keep[span], "dhs": dhs[span]}

    return (run.grad_x.unflatten(2, a.shape[2:]), run.grad_x), begin, step, end, factors


def grad_v(outputs: Tensor, h0: Tensor, grad_p: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """Return dL/dv [hidden, r]: the sum over the steps of h_prev^T grad_p, without a copy of the previous states.

    grad_p [steps, batch, r] is 0 at padding; lengths as the op got them.
    """
    earlier, later = (outputs[1:], grad_p[:-1]) if reverse else (outputs[:-1], grad_p[1:])
    begin = grad_p[-1] if reverse else grad_p[0]
    if reverse and lengths is not None:
        begin = grad_p[lengths.to(grad_p.device) - 1, torch.arange(grad_p.shape[1], device=grad_p.device)]
    total = h0.t() @ begin
    return total.addmm_(earlier.flatten(0, 1).t(), later.flatten(0, 1))
