"""The base class of the executions of a layer."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import Layer

Shapes = dict[str, tuple[int, ...]]
"""The shapes of all values that are float32 tensors whose shape is known before they are computed."""


class Execution(ABC):
    """One way to compute a layer exactly."""

    name: ClassVar[str]
    by_kernels: ClassVar[bool] = False  # in padded buffers, by native/kernels.c, as a step of a plan

    @abstractmethod
    def fits(self, node: Layer, shapes: Shapes) -> bool:
        """Check whether it can compute this layer for values of these shapes."""

    def run(self, node: Layer, values: dict[str, Any]) -> Tensor:
        """Compute the layer with torch. An execution by kernels needs this where no plan can hold the layer.

        That is without a library, or for a shape that does not fit.
        """
        return node.run(values)
