"""The time loops in C of recurrent layers: recurrent.h and, for training, backward.h. float32 on the CPU."""

import ctypes
from typing import Any

from torch import Tensor

from str_triton.native.build import library
from str_triton.native.threads import thread_count

CELLS = ("gru", "lstm", "fastgrnn", "mgu")  # in the order of recurrent.h
UNITS = 2  # vectors of hidden units in a block, as in recurrent.h
FEW = 3e5  # multiplications below which a second thread costs more time than it saves
ACTIVATION = 40  # multiplications that take as long as the activations of one gate of one unit


class LoopStruct(ctypes.Structure):
    """The struct `recurrent` of recurrent.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("cell", "gates", "reverse", "steps", "batch", "hidden", "inner")),
        *((name, ctypes.c_int64) for name in ("panels", "width", "features")),
        *((name, ctypes.c_void_p) for name in ("x", "h", "c", "y", "counts", "kept")),
        *((name, ctypes.c_void_p) for name in ("v", "w", "scales", "bias", "w_in", "bias_in")),
        ("zeta", ctypes.c_float),
        ("nu", ctypes.c_float),
        ("scratch", ctypes.c_void_p),
    ]


class WalkStruct(ctypes.Structure):
    """The struct `walk` of backward.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("lstm", "gates", "backward", "steps", "batch", "hidden", "rank")),
        *((name, ctypes.c_int64) for name in ("panels", "width", "pitch")),
        *(
            (name, ctypes.c_void_p)
            for name in ("counts", "grad", "a", "keep", "a_c", "gates_grad", "p_grad", "dh", "dc", "dhs")
        ),
        *((name, ctypes.c_void_p) for name in ("w", "v", "scratch")),
    ]


def kernels(cell: str) -> ctypes.CDLL | None:
    """Return the kernels if they have a loop for this cell; None: they have none, or cannot be compiled."""
    return library() if cell in CELLS else None


def blocks(weight: Tensor, parts: int, lanes: int) -> Tensor:
    """Return a matrix [parts * hidden, inner] as [blocks, inner, UNITS, parts, lanes], with zeros at its end."""
    rows, inner = weight.shape
    hidden, units = rows // parts, UNITS * lanes
    count = -(-hidden // units)
    padded = weight.new_zeros((parts, count * units, inner))
    padded[:, :hidden] = weight.reshape(parts, hidden, inner)
    return padded.view(parts, count, UNITS, lanes, inner).permute(1, 4, 2, 0, 3).contiguous()


def panels(v: Tensor, lanes: int) -> tuple[Tensor, int]:
    """Return a matrix [rows, rank] as [panels, rows, width * lanes], with zeros at its end, and the width."""
    rows, rank = v.shape
    width = 1 if rank <= lanes else 2
    count = -(-rank // (width * lanes))
    padded = v.new_zeros((rows, count * width * lanes))
    padded[:, :rank] = v
    return padded.view(rows, count, width * lanes).transpose(0, 1).contiguous(), width


def forward(
    kernels: ctypes.CDLL, cell: str, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor,
    states: list[Tensor], reverse: bool, counts: Tensor | None, kept: Tensor | None,
) -> Tensor:  # fmt: skip
    """Run a layer whose recurrent matrix is w v^T.

    Args:
        kernels: the library.
        cell: one of CELLS.
        gates_x: [T, B, gates * H], the input's part of the gates. All tensors are float32, contiguous, on the CPU.
        w, v: [gates * H, r] and [H, r].
        bias, scale: as `ops.low_rank_rnn` takes them.
        states: [B, H], h and perhaps c.
        reverse: run from the last step to the first.
        counts: int64 [T], how many sequences, the first ones, run at each step; None: all.
        kept: zeros, to be written for the backward: c after every step [T, B, H], or FastGRNN's z and n [T, B, 2 H].

    Returns:
        [T + states, B, H]: the outputs, the last h, perhaps the last c.
    """
    steps, batch, width_x = gates_x.shape
    hidden, rank = v.shape
    gates, lanes = width_x // hidden, kernels.str_triton_lanes()
    new = gates_x.new_empty if counts is None else gates_x.new_zeros
    y = new((steps + len(states), batch, hidden))
    if y.numel() == 0:
        return y
    packed_v, width = panels(v, lanes)
    held = [blocks(w, gates, lanes), blocks(bias[:, None], len(bias) // hidden, lanes), packed_v]
    loop = LoopStruct(CELLS.index(cell), gates, reverse, steps, batch, hidden, rank, len(packed_v), width)
    loop.w, loop.bias, loop.v = (tensor.data_ptr() for tensor in held)
    loop.x, loop.h, loop.c, loop.y = (t.data_ptr() for t in (gates_x, states[0], states[-1], y))
    if counts is not None:
        loop.counts = counts.data_ptr()
    if kept is not None:
        loop.kept = kept.data_ptr()
    if len(scale):
        loop.zeta, loop.nu = scale.tolist()
    scratch = y.new_empty(kernels.str_triton_recurrent_scratch(ctypes.addressof(loop)))
    loop.scratch = scratch.data_ptr()
    products = hidden * gates * (rank + ACTIVATION) + hidden * rank
    kernels.str_triton_recurrent(ctypes.addressof(loop), threads_for(steps * batch * products), False)
    return y


class Walk:
    """The backward of a layer: its packed factors, for one piece of time after the other.

    Args:
        kernels: the library.
        w, v: [gates * H, r] and [H, r]; all tensors are float32, contiguous, on the CPU.
    """

    def __init__(self, kernels: ctypes.CDLL, w: Tensor, v: Tensor) -> None:
        lanes = kernels.str_triton_lanes()
        (hidden, rank), self._kernels = v.shape, kernels
        self._w, width = panels(w, lanes)
        self._v = blocks(v, 1, lanes)
        self._products = 2 * (len(w) + hidden) * rank
        self._struct = WalkStruct(gates=len(w) // hidden, hidden=hidden, rank=rank, panels=len(self._w), width=width)
        self._struct.w, self._struct.v = self._w.data_ptr(), self._v.data_ptr()

    def run(self, *, falls: bool, counts: Tensor | None, **tensors: Any) -> None:
        """Walk through the steps of a piece of time, which `falls` or rises.

        Args:
            falls: begin with the last step.
            counts: int64 [steps], as in `forward`.
            tensors: by the names of backward.h, [steps, batch, ...]; `keep` may be part of a wider tensor.
        """
        walk, keep = self._struct, tensors["keep"]
        walk.steps, walk.batch = keep.shape[:2]
        if tensors["grad"].numel() == 0:
            return
        walk.counts = None if counts is None else counts.data_ptr()
        walk.lstm, walk.backward, walk.pitch = "dc" in tensors, falls, keep.stride(1)
        for name, tensor in tensors.items():
            setattr(walk, name, tensor.data_ptr())
        scratch = keep.new_empty(self._kernels.str_triton_walk_scratch(ctypes.addressof(walk)))
        walk.scratch = scratch.data_ptr()
        self._kernels.str_triton_walk(ctypes.addressof(walk), threads_for(walk.steps * walk.batch * self._products))


def threads_for(products: float) -> int:
    """Return how many threads are worth while for so many multiplications."""
    return thread_count() if products > FEW else 1
