"""Pools over the pixels of an image."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import Node, Pair, output_sizes


@dataclass
class MaxPool(Node):
    """A 2-d max pool without indices. `ceil`: its size is rounded up."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil: bool = False

    def run(self, values: dict[str, Any]) -> Tensor:
        return F.max_pool2d(values[self.inputs[0]], self.kernel, self.stride, self.padding, self.dilation, self.ceil)


@dataclass
class AvgPool(Node):
    """A 2-d average pool, as torch has it. `ceil`: its size is rounded up; `whole`: zeros of the padding count."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil: bool = False
    whole: bool = True

    dilation: ClassVar[Pair] = (1, 1)

    def run(self, values: dict[str, Any]) -> Tensor:
        return F.avg_pool2d(values[self.inputs[0]], self.kernel, self.stride, self.padding, self.ceil, self.whole)

    def is_uniform(self, shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
        """Check that every output is the same weighted sum for an input and an output of these shapes."""
        floor = output_sizes(shape[2:], self.kernel, self.stride, self.padding, self.dilation)
        return floor == out[2:] and (self.whole or self.padding == (0, 0))


@dataclass
class Mean(Node):
    """The mean over the last two dimensions, [B, C, H, W] -> [B, C], or [B, C, 1, 1] if `keep`."""

    keep: bool = False

    def run(self, values: dict[str, Any]) -> Tensor:
        return values[self.inputs[0]].mean((-2, -1), keepdim=self.keep)
