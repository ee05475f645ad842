"""The sparse microkernel: a layer as a list of its weights that are not zero."""

import math

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.graph.nodes import Convolution, Layer, Linear


class Kernel(Execution):
    """Our own kernels in C, for convolutions on padded images and for linear layers."""

    name = "sparse"
    by_kernels = True

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        found = [shapes.get(name) for name in (node.inputs[0], node.name)]
        if node.variable or None in found or math.prod(found[0]) * math.prod(found[1]) == 0:
            return False
        if isinstance(node, Linear):
            return len(node.inputs) == 1
        if not isinstance(node, Convolution) or len(found[0]) != 4:
            return False
        # A residual that is broadcast, or makes the convolution's own output so, is left to torch.
        own = node.output_shape(found[0])
        return all(shapes.get(name) == own for name in (node.name, *node.inputs[1:]))
