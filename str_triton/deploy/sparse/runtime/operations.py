"""Operations of kernels.c on the buffers of a plan."""

import ctypes
import math

import numpy as np

from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import ACTIVATIONS, Layer
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool
from str_triton.deploy.sparse.runtime.buffers import FLOAT, Buffers, Key
from str_triton.deploy.sparse.runtime.layout import GRAIN, Window, mask, offsets, plane_sizes
from str_triton.deploy.sparse.runtime.structs import (
    CONVOLUTION,
    COPY,
    GATE,
    LINEAR,
    LINEAR_BYTES,
    MAX_POOL,
    MEAN,
    TAP,
    TURN,
    Operation,
    View,
)

TURNED = 256  # channels that a thread turns at a time


class Operations:
    """Makes operations for kernels with vectors of `lanes` floats, and keeps the arrays alive that they point to."""

    def __init__(self, buffers: Buffers, lanes: int) -> None:
        self.buffers, self.lanes = buffers, lanes
        self._kept: list[np.ndarray] = []
        self._masks: dict[tuple, np.ndarray] = {}

    def window(
        self, node: Layer | MaxPool | AvgPool, window: Window, x: Key, y: Key, residual: Key | None, choice: Choice
    ) -> Operation:
        """Return a convolution, a linear layer on turned values, or a pool; an average is a depthwise convolution."""
        frame, shape = self.buffers.frame(y), self.buffers.shape(y)
        op = self._sliding(window, x, y, residual)
        if y.turned:  # A few rows take no more vectors than they need.
            op.length = -(-shape[3] // self.lanes) * self.lanes
        if isinstance(node, Layer):
            op.kind = CONVOLUTION
            _activate(op, node)
            weight, bias, groups = node.weight.numpy(), node.bias.numpy(), getattr(node, "groups", 1)
        else:
            op.kind, op.low, op.high = MAX_POOL if isinstance(node, MaxPool) else CONVOLUTION, -math.inf, math.inf
            value = 1 / math.prod(node.kernel)
            weight, bias, groups = (
                np.full((shape[1], *node.kernel), value, np.float32),
                np.zeros(shape[1], np.float32),
                shape[1],
            )
        first, places, values = nonzeros(weight, groups)
        taps = np.empty((window.tables, len(values)), TAP)
        for plane, table in enumerate(taps):
            found = offsets(window, frame, plane, self.buffers.shape(x)[1]).ravel()
            table["value"], table["offset"] = values, found[places]
        starts = np.concatenate([first + plane * len(values) for plane in range(window.tables)]).astype(np.int32)
        self._point(op, taps=taps, first=starts, bias=bias)
        self._hide_padding(op, y)
        self.cut(op, choice)
        return op

    def _sliding(self, window: Window, x: Key, y: Key, residual: Key | None) -> Operation:
        """Return an operation that slides a window, with its images but without its weights."""
        buffers, shape = self.buffers, self.buffers.shape(y)
        op = Operation(x=buffers.view(x), y=buffers.view(y), images=buffers.at_once(y), channels=shape[1])
        op.planes, op.tables = math.prod(y.phases), window.tables
        op.length = buffers.frame(y).length(max(rows for rows, _ in plane_sizes(shape[2:], y.phases)))
        if window.tables > 1 or op.planes == 1:
            op.x.plane = 0  # The taps say which plane they read.
        if residual is not None:
            op.residual = buffers.view(residual)
        return op

    def gate(self, x: Key, y: Key) -> Operation:
        """Return the product of an image with a tensor of factors [images, channels, 1, 1]."""
        _, channels, rows, _ = self.buffers.shape(y)
        op = Operation(kind=GATE, images=self.buffers.at_once(y), channels=channels, planes=1)
        op.x, op.y, op.residual = self.buffers.view(x), self.buffers.view(y), View(None, channels, 1, 0, 0, 0)
        op.length, op.items = self.buffers.frame(y).length(rows), op.images * channels
        self._hide_padding(op, y)
        return op

    def _hide_padding(self, op: Operation, y: Key) -> None:
        """Make an operation write zeros into the padding of an image."""
        frame = self.buffers.frame(y)
        if frame.gap or frame.above or frame.below:
            self._point(op, mask=self._mask(y, op.length))

    def cut(self, op: Operation, choice: Choice) -> None:
        """Divide the work as `choice` says, into blocks of channels with about the same number of taps."""
        first = np.ctypeslib.as_array(ctypes.cast(op.first, ctypes.POINTER(ctypes.c_int32)), (op.channels + 1,))
        # A channel costs as much as its taps, and about one tap more for the work that is done once per channel.
        cost = first - first[0] + np.arange(op.channels + 1)
        op.blocks = max(1, min(choice.blocks, op.channels))
        wanted = np.linspace(0, cost[-1], op.blocks + 1)
        block_first = np.searchsorted(cost, wanted).astype(np.int32)
        block_first[0], block_first[-1] = 0, op.channels
        self._point(op, block_first=block_first)
        op.width = choice.width
        if op.kind in (LINEAR, LINEAR_BYTES):
            op.items = op.blocks * op.images
        else:
            parts = op.images * op.planes
            op.tiles = max(1, min(-(-choice.tiles // parts), op.length // GRAIN))
            op.items = parts * op.tiles * op.blocks

    def copies(
        self, value: str, source: Key | None, target: Key | None, skipped: tuple[int, int] = (0, 0), size: int = FLOAT
    ) -> list[tuple[Operation, int]]:
        """Return a copy for each row phase of an image, and the offset of its first pixel in torch's tensor, in bytes.

        At least one side must be in one phase: its rows and columns are read or written with strides.

        Args:
            value: the value whose channels and pixels are copied.
            source, target: an image; None: torch's tensor, whose address is known only at the call.
            skipped: the channels before those of the value, in source and in target, for images with more channels.
            size: the bytes of an element of the tensor.
        """
        if (source or target).turned:
            return [(self._turn(source, target), 0)]
        _, channels, height, width = self.buffers.shapes[value]
        images = self.buffers.at_once(source or target)
        phases = max(key.phases for key in (source, target) if key)
        found = []
        for p in range(phases[0]):
            rows = len(range(p, height, phases[0]))
            op = Operation(kind=COPY, images=images, channels=channels, rows=rows, columns=width, tables=phases[1])
            for key, name, before in zip((source, target), ("x", "y"), skipped, strict=True):
                if key and key.phases == phases:
                    view = self.buffers.view(key, p * phases[1], before)
                else:
                    view = self.buffers.view(key, 0, before) if key else _tensor(channels, height, width)
                    view.data = (view.data or 0) + (self.buffers.size(key.value) if key else size) * p * view.row
                    view.plane, view.row, view.column = 1, view.row * phases[0], phases[1]
                setattr(op, name, view)
            op.items = images * channels
            found.append((op, size * p * width))
        return found

    def _turn(self, source: Key | None, target: Key | None) -> Operation:
        """Return the copy of a value [..., features] between torch's tensor (None) and its turned form."""
        _, channels, _, columns = self.buffers.shape(source or target)
        tensor = View(None, 0, 1, 0, 0, channels)
        x, y = (self.buffers.view(key) if key else tensor for key in (source, target))
        op = Operation(kind=TURN, channels=channels, columns=columns, blocks=-(-channels // TURNED), x=x, y=y)
        op.items = op.blocks * -(-columns // GRAIN)
        return op

    def mean(self, source: Key) -> Operation:
        _, channels, rows, columns = self.buffers.shapes[source.value]
        images = self.buffers.at_once(source)
        op = Operation(kind=MEAN, images=images, channels=channels, planes=1, rows=rows, columns=columns)
        op.x, op.y = self.buffers.view(source), View(None, channels, 1, 0, 0, 0)
        op.items = images * channels
        return op

    def linear(self, node: Layer, images: int, choice: Choice) -> Operation:
        """Return a layer that multiplies one row of features, or one row for each image of one pixel."""
        outputs, inputs = node.weight.shape[:2]
        op = Operation(kind=LINEAR, images=images, channels=outputs, planes=1, tables=1)
        op.x, op.y = View(None, inputs, 1, 0, 0, 0), View(None, outputs, 1, 0, 0, 0)
        _activate(op, node)
        first, places, values = nonzeros(node.weight.numpy(), 1)
        taps = np.empty(len(values), TAP)
        taps["value"], taps["offset"] = values, places
        self._point(op, taps=taps, first=first, bias=node.bias.numpy())
        self.cut(op, choice)
        return op

    def _point(self, op: Operation, **arrays: np.ndarray | None) -> None:
        for name, array in arrays.items():
            if array is not None:
                array = np.ascontiguousarray(array)
                self._kept.append(array)
                setattr(op, name, array.ctypes.data)

    def _mask(self, key: Key, length: int) -> np.ndarray:
        size, frame = self.buffers.shapes[key.value][2:], self.buffers.frame(key)
        identity = (size, key.phases, frame.pitch, length)
        if identity not in self._masks:
            self._masks[identity] = mask(frame, size, key.phases, length)
        return self._masks[identity]


def _activate(op: Operation, node: Layer) -> None:
    op.low, op.high, op.slope = *node.clamp, node.slope
    op.activation = list(ACTIVATIONS).index(node.activation) + 1 if node.activation else 0


def _tensor(channels: int, height: int, width: int) -> View:
    """Return the strides of torch's contiguous tensor [images, channels, height, width]."""
    return View(None, channels * height * width, height * width, 0, width, 1)


def nonzeros(weight: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the weights that are not zero, by output channel.

    Returns:
        The index in the next two arrays at which each channel begins; the positions of the weights in the input of all
        groups, [inputs, kernel]; the values of the weights.
    """
    channels, size = weight.shape[0], weight[0].size
    flat = np.flatnonzero(weight.ravel() != 0)
    first = np.searchsorted(flat, np.arange(channels + 1) * size).astype(np.int32)
    # A position is the flat index within the weight's output channel, plus the size of the groups before.
    channel = np.arange(channels)
    shift = channel * size - channel // (channels // groups) * size
    return first, flat - np.repeat(shift, np.diff(first)), weight.ravel()[flat]
