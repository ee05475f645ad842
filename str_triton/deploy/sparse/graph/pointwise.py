"""Arithmetic on the single elements of a value: norms, sums and activations that are part of no other layer."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import FREE, Call, Convolution, Node
from str_triton.deploy.sparse.graph.refs import Ref

aten = torch.ops.aten


@dataclass
class Pointwise(Convolution):
    """activation(clamp(x * weight + bias + residual)) by channel: to the kernels a depthwise 1x1 convolution.

    Torch runs it as the operations that it was made from.

    Attributes:
        scales: weight and bias are not those of the identity.
    """

    scales: bool = False

    @classmethod
    def identity(cls, name: str, inputs: list[str], channels: int) -> "Pointwise":
        weight = torch.ones(channels, 1, 1, 1, dtype=torch.float32, device="cpu")
        bias = torch.zeros(channels, dtype=torch.float32, device="cpu")
        return cls(name, inputs, weight, bias, FREE, groups=channels)

    def run(self, values: dict[str, Any]) -> Tensor:
        x = y = values[self.inputs[0]]
        if self.scales:
            scale = self.weight.flatten()
            zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
            y = torch.batch_norm(x, scale, self.bias, zeros, ones, False, 0.0, 0.0, False)
        if y is not x or len(self.inputs) > 1:
            return self.finish(y, values)
        if self.clamp == (0.0, math.inf):
            y = x.relu()
        elif self.clamp != FREE:
            y = x.clamp(*self.clamp)
        return self.activate(y)


@dataclass
class Norm(Node):
    """A batch norm y = x * scale + shift by channel, [float64], or the sum or product of an image and a number.

    `dims` is the number of x's dimensions, `target` the operation that torch runs with `number`, if there is one.
    """

    scale: Tensor
    shift: Tensor
    dims: int
    target: Any = None
    number: float = 0.0

    @property
    def channels(self) -> int:
        return len(self.scale) if self.dims == 4 else 0

    def as_layer(self) -> Pointwise:
        channels = len(self.scale)
        layer = Pointwise.identity(self.name, self.inputs, channels)
        layer.weight, layer.bias = self.scale.float().view(channels, 1, 1, 1), self.shift.float()
        layer.scales = True
        return layer

    def as_call(self) -> Call:
        if self.target is not None:
            args = (Ref(self.inputs[0]), self.number)
            return Call(self.name, self.inputs, self.target, args, variable=self.variable)
        scale, shift = self.scale.float(), self.shift.float()
        args = (Ref(self.inputs[0]), scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0)
        return Call(self.name, self.inputs, aten.batch_norm.default, (*args, False), variable=self.variable)


@dataclass
class Activation(Node):
    """A function of each element, not fused yet: a clamp, or a name in ACTIVATIONS with the slope of "leaky_relu".

    `channels` is the second size of an image, 0 of anything else.
    """

    channels: int = 0
    clamp: tuple[float, float] = FREE
    activation: str = ""
    slope: float = 0.01

    def as_layer(self) -> Pointwise:
        layer = Pointwise.identity(self.name, self.inputs, self.channels)
        layer.clamp, layer.activation, layer.slope = self.clamp, self.activation, self.slope
        return layer

    def as_call(self) -> Call:
        args: tuple = (Ref(self.inputs[0]),)
        kwargs = {"approximate": "tanh"} if self.activation == "gelu_tanh" else {}
        if self.activation:
            target = getattr(aten, self.activation.removesuffix("_tanh")).default
            args += (self.slope,) if self.activation == "leaky_relu" else ()
        elif self.clamp == (0.0, math.inf):
            target = aten.relu.default
        else:
            target, args = aten.clamp.default, (*args, *self.clamp)
        return Call(self.name, self.inputs, target, args, kwargs, variable=self.variable)


@dataclass
class Add(Node):
    """A sum of two values of one shape, not fused yet; `channels` as in Activation."""

    channels: int = 0

    def as_layer(self) -> Pointwise:
        return Pointwise.identity(self.name, self.inputs, self.channels)

    def as_call(self) -> Call:
        args = tuple(map(Ref, self.inputs))
        return Call(self.name, self.inputs, aten.add.Tensor, args, variable=self.variable)
