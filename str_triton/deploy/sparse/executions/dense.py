"""Dense products by torch, in its two memory formats."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.executions.base import Execution, Shapes
from str_triton.deploy.sparse.graph.nodes import Convolution, Layer


class Dense(Execution):
    """Torch's dense product in whatever memory format the input has."""

    name = "dense"

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        return True


class ChannelsLast(Execution):
    """Torch's dense convolution with pixels in the order of channels."""

    name = "channels_last"

    def fits(self, node: Layer, shapes: Shapes) -> bool:
        # Torch 2.13 crashes on some grouped convolutions with dilation in this format.
        is_safe = type(node) is Convolution and (node.groups == 1 or node.dilation == (1, 1))
        return is_safe and node.inputs[0] in shapes

    def run(self, node: Layer, values: dict[str, Any]) -> Tensor:
        x = values[node.inputs[0]].contiguous(memory_format=torch.channels_last)
        weight = node.prepare(self.name, lambda weight: weight.contiguous(memory_format=torch.channels_last))
        y = F.conv2d(x, weight, node.bias, node.stride, node.padding, node.dilation, node.groups)
        return node.finish(y, values)
