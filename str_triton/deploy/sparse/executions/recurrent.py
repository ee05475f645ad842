"""The executions of recurrent layers beside the op's own loop: loops in C, and torch's own layers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.graph.nodes import Layer
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.runtime.recurrent import PackedLoop
from str_triton.native.build import library

LARGE = 2**16  # weights from which on two threads can be faster than one for a single sequence
# A product of factors is multiplied out where it is small, or has few times as many weights as the factors.
SMALL, TIMES = 2**16, 4


class Loop(Execution):
    """The time loop in C; the threads share out the sequences of a batch."""

    name = "loop"
    packed = "loop"  # the form of the weights, which executions may share
    shared = False

    def form(self, node: Recurrent) -> Recurrent:
        """Return the layer with the weights that the loop multiplies with."""
        return node

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        known = isinstance(node, Recurrent) and all(name in shapes for name in (*node.inputs, node.name))
        return known and library() is not None

    def run(self, node: Recurrent, values: dict[str, Any]) -> Tensor:
        x, *states = inputs = node.check(values)
        if not all(map(_is_plain, inputs)):
            return node.run(values)
        loop: Any = node.prepare(self.packed, lambda _: PackedLoop(self.form(node), library()))
        x = x if loop.projects(x.shape[1]) else node.gates_x(x)
        return loop.run(x.contiguous(), [state.contiguous() for state in states], self.shared)


class SharedLoop(Loop):
    """The time loop in C; the threads share the hidden units where there are fewer sequences than threads."""

    name = "loop_shared"
    shared = True

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        is_float = node.weight.dtype == torch.float32  # Each sequence's numbers become codes in one thread.
        return super().fits(node, shapes) and is_float and node.weight.numel() >= LARGE


class DenseLoop(Loop):
    """The time loop in C with the product of a layer's factors, multiplied out."""

    name = packed = "loop_dense"

    def form(self, node: Recurrent) -> Recurrent:
        return replace(node, weight=node.weight @ node.v.t(), v=None)

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        return super().fits(node, shapes) and node.v is not None and _has_dense(node)


class TorchLayer(Execution):
    """Torch's own GRU or LSTM, with the recurrent matrix or the product of its factors."""

    name = "torch_layer"

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        is_whole = isinstance(node, Recurrent) and _has_dense(node) and node.weight_in is not None
        known = is_whole and all(name in shapes for name in (*node.inputs, node.name))
        return known and node.cell in ("gru", "lstm") and 0 not in shapes[node.inputs[0]]

    def run(self, node: Recurrent, values: dict[str, Any]) -> Tensor:
        x, *states = node.check(values)
        x = x.flip(0) if node.reverse else x
        weight = node.weight if node.v is None else node.prepare(self.name, lambda weight: weight @ node.v.t())
        weights = [node.weight_in, weight, node.bias_in, node.bias]
        states = [state.unsqueeze(0).contiguous() for state in states]
        run = torch._VF.gru if node.cell == "gru" else torch._VF.lstm
        hx = states[0] if node.cell == "gru" else states
        outputs, *finals = run(x, hx, weights, True, 1, 0.0, False, False, False)
        return torch.cat([outputs.flip(0) if node.reverse else outputs, *finals])


RECURRENT = (Loop(), SharedLoop(), DenseLoop(), TorchLayer())


def _has_dense(node: Recurrent) -> bool:
    """Check whether a dense recurrent matrix in float32 may be faster than what the node has."""
    held = node.weight.numel() + (0 if node.v is None else node.v.numel())
    return node.weight.dtype == torch.float32 and len(node.weight) * node.hidden <= max(SMALL, TIMES * held)


def _is_plain(x: Tensor) -> bool:
    """Check that the loop can read a tensor, once it is contiguous."""
    return x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided and not x.is_neg()
