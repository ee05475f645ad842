"""Operations on bytes, for layers on 8-bit integers and the operations between them."""

import ctypes

import numpy as np
from torch import Tensor

from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.pools import MaxPool
from str_triton.deploy.sparse.graph.quantized import (
    TOP,
    Grid,
    QuantizedConvolution,
    QuantizedGate,
    QuantizedLinear,
    QuantizedMean,
)
from str_triton.deploy.sparse.runtime.buffers import FLOAT, Key
from str_triton.deploy.sparse.runtime.layout import Window, offsets
from str_triton.deploy.sparse.runtime.operations import Operations, nonzeros
from str_triton.deploy.sparse.runtime.quads import quads
from str_triton.deploy.sparse.runtime.structs import (
    BYTE_TAP,
    CONVOLUTION_BYTES,
    COPY_BYTES,
    DEQUANTIZE,
    GATE_BYTES,
    LINEAR_BYTES,
    MAX_POOL_BYTES,
    MEAN_BYTES,
    QUAD,
    QUANTIZE,
    TAP,
    Integers,
    Operation,
    View,
)

SLACK = 64  # bytes of the widest vector, which may be read beyond the end of a mask


class ByteOperations(Operations):
    """Makes operations on floats and on bytes."""

    def byte_window(
        self, node: QuantizedConvolution | MaxPool, window: Window, x: Key, y: Key, residual: Key | None, choice: Choice
    ) -> Operation:
        """Return a convolution or a max pool of codes."""
        op = self._sliding(window, x, y, residual)
        tables = [offsets(window, self.buffers.frame(y), plane, self.buffers.shape(x)[1]) for plane in range(op.tables)]
        if isinstance(node, MaxPool):
            op.kind = MAX_POOL_BYTES
            first, places, _ = nonzeros(np.ones((op.channels, *node.kernel), np.float32), op.channels)
            taps = np.zeros((op.tables, len(places)), TAP)
            codes = Integers()
        else:
            op.kind = CONVOLUTION_BYTES
            first, places, weights = node.prepare("quads", lambda weight: quads(weight.numpy(), node.groups))
            taps = np.zeros((op.tables, len(places)), QUAD)
            taps["weights"] = weights
            codes = self._products(op, node)
            op.low, op.high = node.rounded.limits(node.clamp)
            codes.zero_y, codes.residual = node.rounded.zero, node.residual_factor()
            codes.zero_residual = node.grids[2].zero if residual is not None else 0
            if node.table is not None:
                codes.table = self._keep(_array(node.table))
        for table, found in zip(taps, tables, strict=True):
            table["offset"] = found.ravel()[places]
        starts = np.concatenate([first + plane * len(places) for plane in range(op.tables)]).astype(np.int32)
        self._point(op, taps=taps, first=starts)
        codes.fill = y.fill
        self._keep_codes(op, codes)
        self._hide_byte_padding(op, y)
        self.cut(op, choice)
        return op

    def _hide_byte_padding(self, op: Operation, y: Key) -> None:
        """Make an operation write the code of zero into the padding of an image."""
        frame = self.buffers.frame(y)
        if frame.gap or frame.above or frame.below:
            mask = self._mask(y, op.length).astype(np.uint8).ravel()  # -1 becomes 255.
            self._point(op, mask=np.concatenate([mask, np.zeros(SLACK, np.uint8)]))

    def byte_gate(self, node: QuantizedGate, x: Key, y: Key) -> Operation:
        """Return the product of an image of codes with a tensor of factors [images, channels, 1, 1]."""
        op = self.gate(x, y)
        op.kind, op.mask = GATE_BYTES, None
        zero_x, zero_y = (grid.zero for grid in node.grids)
        op.low, op.high = -zero_y, TOP - zero_y
        self._keep_codes(op, Integers(scale=node.ratio(), zero_x=zero_x, zero_y=zero_y, fill=y.fill))
        self._hide_byte_padding(op, y)
        return op

    def byte_linear(self, node: QuantizedLinear, rows: int, choice: Choice) -> Operation:
        """Return a linear layer from codes [rows, in] to float32."""
        outputs, inputs = node.weight.shape
        op = Operation(kind=LINEAR_BYTES, images=rows, channels=outputs, planes=1, tables=1)
        op.x, op.y = View(None, inputs, 1, 0, 0, 0), View(None, outputs, 1, 0, 0, 0)
        op.low, op.high = node.clamp
        first, places, values = nonzeros(node.weight.numpy(), 1)
        taps = np.zeros(len(values), BYTE_TAP)
        taps["weight"], taps["offset"] = values, places
        self._point(op, taps=taps, first=first)
        self._keep_codes(op, self._products(op, node))
        self.cut(op, choice)
        return op

    def byte_mean(self, node: QuantizedMean, source: Key) -> Operation:
        op = self.mean(source)
        op.kind = MEAN_BYTES
        self._keep_codes(op, Integers(scale=node.factor(op.rows * op.columns), zero_x=node.grid.zero))
        return op

    def byte_copies(
        self, value: str, source: Key | None, target: Key | None, skipped: tuple[int, int] = (0, 0)
    ) -> list[tuple[Operation, int]]:
        """Return copies of codes; arguments and results are those of `copies`."""
        found = self.copies(value, source, target, skipped, size=1)
        for op, _ in found:
            op.kind = COPY_BYTES
        return found

    def coders(self, value: str, source: Key | None, target: Key | None, grid: Grid) -> list[tuple[Operation, int]]:
        """Return operations that quantize a tensor (source None), or that dequantize codes to one (target None).

        If both are None, a tensor [rows, features] becomes another one.
        """
        if source is None and target is None:
            rows, features = self.buffers.shapes[value]
            view = View(None, features, 0, 0, 0, 1)
            op = Operation(images=rows, channels=1, rows=1, columns=features, tables=1, items=rows, x=view, y=view)
            found = [(op, 0)]
        else:
            found = self.copies(value, source, target, size=FLOAT)
        for op, _ in found:
            op.kind = QUANTIZE if self.buffers.size(value) == 1 else DEQUANTIZE
            op.low, op.high = -grid.zero, TOP - grid.zero
            self._keep_codes(op, Integers(scale=grid.scale, zero_x=grid.zero, zero_y=grid.zero))
        return found

    def _products(self, op: Operation, node: QuantizedConvolution | QuantizedLinear) -> Integers:
        """Set a layer's bias so that sums over codes equal sums over steps from zero, and return its numbers."""
        sums = node.weight.flatten(1).sum(1).numpy()  # int64
        bias = node.bias.numpy().astype(np.int64) - node.grids[0].zero * sums
        self._point(op, bias=bias.astype(np.int32))
        return Integers(factors=self._keep(_array(node.factors())))

    def _keep(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return array.ctypes.data

    def _keep_codes(self, op: Operation, codes: Integers) -> None:
        self._kept.append(codes)
        op.codes = ctypes.addressof(codes)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy())
