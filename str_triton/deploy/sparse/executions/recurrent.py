"""The executions of recurrent layers beside the op's own loop: loops in C, and torch's own layers."""

from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.graph.nodes import Layer
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.runtime.build import library
from str_triton.deploy.sparse.runtime.recurrent import PackedLoop

LARGE = 2**16  # weights from which on two threads can be faster than one for a single sequence


class Loop(Execution):
    """The time loop in C; the threads share out the sequences of a batch."""

    name = "loop"
    shared = False

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        known = isinstance(node, Recurrent) and all(name in shapes for name in (*node.inputs, node.name))
        return known and library() is not None

    def run(self, node: Recurrent, values: dict[str, Any]) -> Tensor:
        x, *states = inputs = node.check(values)
        if not all(map(_is_plain, inputs)):
            return node.run(values)
        loop: Any = node.prepare("loop", lambda _: PackedLoop(node, library()))
        x = x if loop.projects(x.shape[1]) else node.gates_x(x)
        return loop.run(x.contiguous(), [state.contiguous() for state in states], self.shared)


class SharedLoop(Loop):
    """The time loop in C; the threads share the hidden units where there are fewer sequences than threads."""

    name = "loop_shared"
    shared = True

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        is_float = node.weight.dtype == torch.float32  # Each sequence's numbers become codes in one thread.
        return super().fits(node, shapes) and is_float and node.weight.numel() >= LARGE


class TorchLayer(Execution):
    """Torch's own GRU or LSTM, for a layer with a dense recurrent matrix."""

    name = "torch_layer"

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        is_dense = type(node) is Recurrent and node.v is None and node.weight_in is not None
        known = is_dense and all(name in shapes for name in (*node.inputs, node.name))
        return known and node.cell in ("gru", "lstm") and 0 not in shapes[node.inputs[0]]

    def run(self, node: Recurrent, values: dict[str, Any]) -> Tensor:
        x, *states = node.check(values)
        x = x.flip(0) if node.reverse else x
        weights = [node.weight_in, node.weight, node.bias_in, node.bias]
        states = [state.unsqueeze(0).contiguous() for state in states]
        run = torch._VF.gru if node.cell == "gru" else torch._VF.lstm
        hx = states[0] if node.cell == "gru" else states
        outputs, *finals = run(x, hx, weights, True, 1, 0.0, False, False, False)
        return torch.cat([outputs.flip(0) if node.reverse else outputs, *finals])


def _is_plain(x: Tensor) -> bool:
    """Check that the loop can read a tensor, once it is contiguous."""
    return x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided and not x.is_neg()
