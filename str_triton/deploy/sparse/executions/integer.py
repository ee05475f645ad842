"""Layers on 8-bit integers by our own kernels in C."""

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.graph.nodes import Layer
from str_triton.deploy.sparse.graph.quantized import QuantizedConvolution, QuantizedLinear


class Integer(Execution):
    """The kernels on bytes, which skip zeros among the weights. The plan knows which values are bytes."""

    name = "int8"
    by_kernels = True

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        return isinstance(node, QuantizedConvolution | QuantizedLinear) and not node.variable
