"""Time loops in recurrent.h: packed weights, and one call for all steps of a layer."""

import ctypes

import numpy as np
import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.recurrent import SIZES, Recurrent
from str_triton.deploy.sparse.runtime.threads import thread_count

UNITS = 2  # vectors of hidden units in a block, as in recurrent.h
CELLS = ("gru", "lstm", "fastgrnn", "mgu")  # in the order of recurrent.h
FEW = 3e5  # multiplications below which a second thread costs more time than it saves
ACTIVATION = 40  # multiplications that take as long as the activations of one gate of one unit


class LoopStruct(ctypes.Structure):
    """The struct `recurrent` of recurrent.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("cell", "gates", "reverse", "steps", "batch", "hidden", "inner")),
        *((name, ctypes.c_int64) for name in ("panels", "width")),
        *((name, ctypes.c_void_p) for name in ("x", "h", "c", "y", "v", "w", "bias")),
        ("zeta", ctypes.c_float),
        ("nu", ctypes.c_float),
        ("scratch", ctypes.c_void_p),
    ]


class PackedLoop:
    """A recurrent layer's weights in the order in which the loop reads them, for vectors of `lanes` floats.

    Two threads must not run one at the same time.
    """

    def __init__(self, node: Recurrent, library: ctypes.CDLL) -> None:
        self.library, self.states, self.hidden = library, node.states, node.hidden
        lanes = library.str_triton_lanes()
        gates, biases, _, _ = SIZES[node.cell]
        weight, inner = node.weight.numpy(), node.weight.shape[1]
        blocks = -(-self.hidden // (UNITS * lanes))
        w = padded(weight.reshape(gates, self.hidden, inner), 1, blocks * UNITS * lanes)
        w = w.reshape(gates, blocks, UNITS, lanes, inner).transpose(1, 4, 2, 0, 3)
        bias = padded(node.bias.numpy().reshape(biases, self.hidden), 1, blocks * UNITS * lanes)
        bias = bias.reshape(biases, blocks, UNITS, lanes).transpose(1, 2, 0, 3)
        self.loop = LoopStruct(cell=CELLS.index(node.cell), gates=gates, reverse=node.reverse, inner=inner)
        self.loop.hidden = self.hidden
        self._arrays = {"w": w, "bias": bias}
        self._products = self.hidden * gates * (inner + ACTIVATION)
        if node.v is not None:
            width = 1 if inner <= lanes else 2
            panels = -(-inner // (width * lanes))
            v = padded(node.v.numpy(), 1, panels * width * lanes)
            self._arrays["v"] = v.reshape(self.hidden, panels, width * lanes).transpose(1, 0, 2)
            self.loop.panels, self.loop.width = panels, width
            self._products += self.hidden * inner
        if node.scale is not None:
            self.loop.zeta, self.loop.nu = node.scale.tolist()
        self._arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in self._arrays.items()}
        for name, array in self._arrays.items():
            setattr(self.loop, name, array.ctypes.data)
        self._address = ctypes.addressof(self.loop)
        self._room = 0  # sequences that fit into the scratch memory

    def run(self, gates_x: Tensor, states: list[Tensor], shared: bool) -> Tensor:
        """Return the node's value; the caller has checked the sizes.

        Args:
            gates_x, states: float32 on the CPU, contiguous.
            shared: let several threads share the units of one sequence.
        """
        steps, batch, _ = gates_x.shape
        loop = self.loop
        y = torch.empty((steps + self.states, batch, self.hidden), dtype=torch.float32, device="cpu")
        if y.numel() == 0:
            return y
        loop.steps, loop.batch = steps, batch
        if self._room < batch:
            floats = self.library.str_triton_recurrent_scratch(self._address)
            self._scratch, self._room = torch.empty(floats, dtype=torch.float32, device="cpu"), batch
            loop.scratch = self._scratch.data_ptr()
        loop.x, loop.h, loop.c = gates_x.data_ptr(), states[0].data_ptr(), states[-1].data_ptr()
        loop.y = y.data_ptr()
        threads = thread_count() if steps * batch * self._products > FEW else 1
        self.library.str_triton_recurrent(self._address, threads, shared)
        return y


def padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return the array with zeros up to this size of an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)
