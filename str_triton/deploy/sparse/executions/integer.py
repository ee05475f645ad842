"""Layers on 8-bit integers by our own kernels in C."""

from typing import Any

from torch import Tensor

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.graph.nodes import Layer
from str_triton.deploy.sparse.graph.quantized import QuantizedConvolution, QuantizedLinear


class Integer(Execution):
    """The kernels on bytes, which skip zeros among the weights. The plan knows which values are bytes."""

    name = "int8"
    by_kernels = True

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        return isinstance(node, QuantizedConvolution | QuantizedLinear) and not node.variable

    def run(self, node: Layer, values: dict[str, Any]) -> Tensor:
        """Compute the layer where no plan can hold it: without a library, or for a shape that does not fit."""
        return node.run(values)
