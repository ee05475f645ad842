"""Time loops in recurrent.h: packed weights, and one call for all steps of a layer."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.graph.quantized_recurrent import QuantizedRecurrent
from str_triton.deploy.sparse.graph.recurrent import SIZES, Recurrent
from str_triton.native.recurrent import ACTIVATION, CELLS, LoopStruct, blocks, panels, threads_for

# The loop itself projects inputs of so few features, for so many sequences or with so few weights. Else the weights,
# which a single sequence reads anew every four steps, cost more than the gates of all steps in memory.
FEATURES, SEQUENCES, SMALL = 128, 4, 2**16


class PackedLoop:
    """A recurrent layer's weights in the order in which the loop reads them, for vectors of `lanes` floats.

    Two threads must not run one at the same time.
    """

    def __init__(self, node: Recurrent, library: ctypes.CDLL) -> None:
        self.library, self.states, self.hidden = library, node.states, node.hidden
        lanes = library.str_triton_lanes()
        gates, biases, _, _ = SIZES[node.cell]
        inner = node.weight.shape[1]
        self._arrays = {"w": blocks(node.weight, gates, lanes), "bias": blocks(node.bias[:, None], biases, lanes)}
        if isinstance(node, QuantizedRecurrent):
            self._arrays["scales"] = blocks(node.steps[:, None], gates, lanes)
        self.loop = LoopStruct(cell=CELLS.index(node.cell), gates=gates, reverse=node.reverse, inner=inner)
        self.loop.hidden = self.hidden
        self._products = self.hidden * gates * (inner + ACTIVATION)
        if node.v is not None:
            self._arrays["v"], self.loop.width = panels(node.v, lanes)
            self.loop.panels = len(self._arrays["v"])
            self._products += self.hidden * inner
        if node.weight_in is not None and node.bias_in is not None:
            self.loop.features = node.weight_in.shape[1]
            self._arrays |= {
                "w_in": blocks(node.weight_in, gates, lanes),
                "bias_in": blocks(node.bias_in[:, None], gates, lanes),
            }
        if node.scale is not None:
            self.loop.zeta, self.loop.nu = node.scale.tolist()
        if isinstance(node, QuantizedRecurrent):
            self._arrays |= {name: _pairs(self._arrays[name]) for name in ("w", "v") if name in self._arrays}
        for name, array in self._arrays.items():
            setattr(self.loop, name, array.data_ptr())
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
        self.library.str_triton_recurrent(self._address, threads_for(steps * batch * products), shared)
        return y


def _pairs(array: Tensor) -> Tensor:
    """Return packed weights [parts, inner, ...] with two successive inputs side by side: [parts, inner / 2, ..., 2]."""
    array = F.pad(array, (0, 0) * (array.dim() - 2) + (0, array.shape[1] % 2))
    return torch.stack([array[:, ::2], array[:, 1::2]], -1)
