"""Single time steps in stepping.h: a stack of recurrent layers with its weights packed."""

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.runtime.recurrent import PackedLoop
from str_triton.native.recurrent import LoopStruct, panels


class Matrix(ctypes.Structure):
    """The struct `matrix` of stepping.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "bias")),
        *((name, ctypes.c_int64) for name in ("inner", "outer", "panels", "width")),
    ]


class StepLayer(ctypes.Structure):
    """The struct `step_layer` of stepping.h."""

    _fields_ = [("first", Matrix), ("second", Matrix), ("loop", LoopStruct)]


class Stepper(ctypes.Structure):
    """The struct `stepper` of stepping.h."""

    _fields_ = [
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "inputs", "hidden", "states", "outputs", "mean")),
        ("head", Matrix),
        ("scratch", ctypes.c_void_p),
        ("room", ctypes.c_int64),
    ]


@dataclass(frozen=True, eq=False)
class StackedLayer:
    """A recurrent layer and the projection of its input.

    Attributes:
        projection: one matrix [gates * hidden, inputs], or its two factors, the right one first.
        bias: [gates * hidden].
        node: the recurrent part.
    """

    projection: list[Tensor]
    bias: Tensor
    node: Recurrent


class PackedStepper:
    """The weights of a stack in the order in which a step reads them."""

    def __init__(
        self, layers: list[StackedLayer], head: tuple[Tensor, Tensor] | None, mean: bool, library: ctypes.CDLL
    ) -> None:
        # PyDLL keeps the interpreter's lock: a call is faster, and two threads cannot use the scratch at once.
        self._library = ctypes.PyDLL(library._name)
        self.lanes = library.str_triton_lanes()
        self._kept: list[object] = []
        packed = [self._layer(layer, library) for layer in layers]
        self._layers = (StepLayer * len(packed))(*packed)
        node = layers[0].node
        self._stepper = Stepper(
            layers=ctypes.addressof(self._layers),
            count=len(layers),
            inputs=layers[0].projection[0].shape[1],
            hidden=node.hidden,
            states=node.states,
            outputs=node.hidden if head is None else len(head[0]),
            mean=mean,
            head=Matrix() if head is None else self._matrix(*head),
        )
        self.address = ctypes.addressof(self._stepper)
        self._scratch_floats = self._library.str_triton_step_scratch
        self._scratch_floats.argtypes, self._scratch_floats.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
        self.step = self._library.str_triton_step
        self.step.argtypes = (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 4)
        self.step.restype = None
        self.room = 0

    def make_room(self, batch: int) -> None:
        """Provide scratch memory for batches of this size."""
        self._scratch = torch.empty(self._scratch_floats(self.address, batch), dtype=torch.float32, device="cpu")
        self._stepper.scratch, self._stepper.room, self.room = self._scratch.data_ptr(), batch, batch

    def _layer(self, layer: StackedLayer, library: ctypes.CDLL) -> StepLayer:
        loop = PackedLoop(layer.node, library)
        self._kept.append(loop)
        *first, second = layer.projection
        made = StepLayer(second=self._matrix(second, layer.bias), loop=loop.loop)
        if first:
            made.first = self._matrix(first[0], torch.zeros(len(first[0])))
        return made

    def _matrix(self, weight: Tensor, bias: Tensor) -> Matrix:
        outer, inner = weight.shape
        w, width = panels(weight.t().float(), self.lanes)
        bias = F.pad(bias.float(), (0, len(w) * width * self.lanes - outer))
        self._kept += [w, bias]
        return Matrix(w.data_ptr(), bias.data_ptr(), inner, outer, len(w), width)
