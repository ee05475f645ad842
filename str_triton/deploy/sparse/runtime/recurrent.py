"""Time loops in recurrent.h: packed weights, and one call for all steps of a layer."""

import ctypes

import numpy as np
import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.quantized_recurrent import QuantizedRecurrent
from str_triton.deploy.sparse.graph.recurrent import SIZES, Recurrent
from str_triton.deploy.sparse.runtime.threads import thread_count

UNITS = 2  # vectors of hidden units in a block, as in recurrent.h
# The loop itself projects inputs of so few features, for so many sequences or with so few weights. Else the weights,
# read in every step, cost more than the gates of all steps in memory.
FEATURES, SEQUENCES, SMALL = 128, 4, 2**13
FEW = 3e5  # multiplications below which a second thread costs more time than it saves
ACTIVATION = 40  # multiplications that take as long as the activations of one gate of one unit


class LoopStruct(ctypes.Structure):
    """The struct `recurrent` of recurrent.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("cell", "gates", "reverse", "steps", "batch", "hidden", "inner")),
        *((name, ctypes.c_int64) for name in ("panels", "width", "features")),
        *((name, ctypes.c_void_p) for name in ("x", "h", "c", "y", "v", "w", "scales", "bias", "w_in", "bias_in")),
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
        inner = node.weight.shape[1]
        self._arrays = {"w": _blocks(node.weight, gates, lanes), "bias": _blocks(node.bias[:, None], biases, lanes)}
        if isinstance(node, QuantizedRecurrent):
            self._arrays["scales"] = _blocks(node.steps[:, None], gates, lanes)
        self.loop = LoopStruct(cell=list(SIZES).index(node.cell), gates=gates, reverse=node.reverse, inner=inner)
        self.loop.hidden = self.hidden
        self._products = self.hidden * gates * (inner + ACTIVATION)
        if node.v is not None:
            width = 1 if inner <= lanes else 2
            panels = -(-inner // (width * lanes))
            v = padded(node.v.numpy(), 1, panels * width * lanes)
            self._arrays["v"] = v.reshape(self.hidden, panels, width * lanes).transpose(1, 0, 2)
            self.loop.panels, self.loop.width = panels, width
            self._products += self.hidden * inner
        if node.weight_in is not None and node.bias_in is not None:
            self.loop.features = node.weight_in.shape[1]
            self._arrays |= {
                "w_in": _blocks(node.weight_in, gates, lanes),
                "bias_in": _blocks(node.bias_in[:, None], gates, lanes),
            }
        if node.scale is not None:
            self.loop.zeta, self.loop.nu = node.scale.tolist()
        if isinstance(node, QuantizedRecurrent):
            self._arrays |= {name: _pairs(self._arrays[name]) for name in ("w", "v") if name in self._arrays}
        self._arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
        for name, array in self._arrays.items():
            setattr(self.loop, name, array.ctypes.data)
        self._projection = self.loop.w_in
        self._address = ctypes.addressof(self.loop)
        self._room = 0  # sequences that fit into the scratch memory

    def projects(self, batch: int) -> bool:
        """Check whether the loop itself computes the input's part of the gates for such a batch."""
        features, weights = self.loop.features, self.hidden * self.loop.gates * self.loop.features
        return self._projection is not None and features <= FEATURES and (batch >= SEQUENCES or weights <= SMALL)

    def run(self, x: Tensor, states: list[Tensor], shared: bool) -> Tensor:
        """Return the node's value; the caller has checked the sizes.

        Args:
            x: the input if `projects(batch)`, else the input's part of the gates; float32 on the CPU, contiguous.
            states: float32 on the CPU, contiguous.
            shared: let several threads share the units of one sequence.
        """
        steps, batch, _ = x.shape
        loop, projects = self.loop, self.projects(batch)
        loop.w_in = self._projection if projects else None
        y = torch.empty((steps + self.states, batch, self.hidden), dtype=torch.float32, device="cpu")
        if y.numel() == 0:
            return y
        loop.steps, loop.batch = steps, batch
        if self._room < batch:
            floats = self.library.str_triton_recurrent_scratch(self._address)
            self._scratch, self._room = torch.empty(floats, dtype=torch.float32, device="cpu"), batch
            loop.scratch = self._scratch.data_ptr()
        loop.x, loop.h, loop.c = x.data_ptr(), states[0].data_ptr(), states[-1].data_ptr()
        loop.y = y.data_ptr()
        products = self._products + projects * self.hidden * loop.gates * loop.features
        threads = thread_count() if steps * batch * products > FEW else 1
        self.library.str_triton_recurrent(self._address, threads, shared)
        return y


def _blocks(weight: Tensor, parts: int, lanes: int) -> np.ndarray:
    """Return a matrix [parts * hidden, inner] as [blocks, inner, UNITS, parts, lanes]."""
    rows, inner = weight.shape
    array = weight.numpy().reshape(parts, rows // parts, inner)
    blocks = -(-array.shape[1] // (UNITS * lanes))
    array = padded(array, 1, blocks * UNITS * lanes)
    return array.reshape(parts, blocks, UNITS, lanes, inner).transpose(1, 4, 2, 0, 3)


def _pairs(array: np.ndarray) -> np.ndarray:
    """Return packed weights [parts, inner, ...] with two successive inputs side by side: [parts, inner / 2, ..., 2]."""
    array = padded(array, 1, -(-array.shape[1] // 2) * 2)
    return np.stack([array[:, ::2], array[:, 1::2]], -1)


def padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return the array with zeros up to this size of an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)
