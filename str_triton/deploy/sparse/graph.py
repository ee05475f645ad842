"""A traced network as a short list of nodes, batch norms folded, activations and residual sums fused: plain data.

A node is a layer that this package executes itself (a convolution, a linear layer, a max pool, a global mean) or a call
of torch's, which runs as it stands.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

FREE = (-math.inf, math.inf)
KEEP = (..., None, None)  # The index that gives a mean its two dimensions back.


@dataclass(frozen=True)
class Ref:
    """An argument that is another node's value."""

    name: str


@dataclass
class Node:
    """One value of the network: `inputs` are names of nodes before it."""

    name: str
    inputs: list[str]


@dataclass
class Input(Node):
    """What the network is given."""


@dataclass
class Constant(Node):
    """A tensor that the network holds."""

    value: Tensor


@dataclass
class Call(Node):
    """A function of torch's (by its name in `trace.FUNCTIONS`) or a module, called as the network calls it."""

    target: str | nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, values: dict[str, Any], functions: dict[str, Any]) -> Any:
        call = functions[self.target] if isinstance(self.target, str) else self.target
        args, kwargs = substitute((self.args, self.kwargs), values)
        return call(*args, **kwargs)


@dataclass
class Layer(Node):
    """A weight layer: inputs are x and, if a sum is fused, the residual that is added before the clamp.

    Attributes:
        weight: float32, batch norm folded in; bias: [out].
        clamp: the activation, as lowest and highest value.
        label: the module's name in the model, for people.
    """

    weight: Tensor
    bias: Tensor
    clamp: tuple[float, float] = FREE
    label: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """Without what by_torch.py prepared, which neither copies nor files can hold."""
        return {name: value for name, value in vars(self).items() if name != "prepared"}

    def finish(self, y: Tensor, values: dict[str, Any]) -> Tensor:
        """Residual and activation for an output that has neither, in place where that is possible."""
        if len(self.inputs) > 1:
            y = y + values[self.inputs[1]]
        if self.clamp == (0.0, math.inf):
            return y.relu_()
        return y if self.clamp == FREE else y.clamp_(*self.clamp)


@dataclass
class Convolution(Layer):
    """A 2-d convolution with zero padding: weight [out, in / groups, height, width]."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, int]:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the convolution alone, for an input [B, C, H, W] of this shape."""
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        geometry = zip(shape[2:], spans, self.stride, self.padding, strict=True)
        return shape[0], self.weight.shape[0], *((n + 2 * p - span) // s + 1 for n, span, s, p in geometry)

    def run(self, values: dict[str, Any]) -> Tensor:
        y = F.conv2d(
            values[self.inputs[0]], self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return self.finish(y, values)


@dataclass
class Linear(Layer):
    """A linear layer on the last dimension: weight [out, in]."""

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.finish(F.linear(values[self.inputs[0]], self.weight, self.bias), values)


@dataclass
class MaxPool(Node):
    """A 2-d max pool without ceil_mode and indices."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def run(self, values: dict[str, Any]) -> Tensor:
        return F.max_pool2d(values[self.inputs[0]], self.kernel, self.stride, self.padding, self.dilation)


@dataclass
class Mean(Node):
    """The mean over the last two dimensions, [B, C, H, W] -> [B, C]."""

    def run(self, values: dict[str, Any]) -> Tensor:
        return values[self.inputs[0]].mean((-2, -1))


@dataclass
class Norm(Node):
    """A batch norm as y = x * scale + shift by channel: folded into the layer before it, if nothing else reads that."""

    scale: Tensor
    shift: Tensor


@dataclass
class Clamp(Node):
    """An activation that clamps, not fused yet."""

    clamp: tuple[float, float]


@dataclass
class Add(Node):
    """A sum of two values, not fused yet."""


@dataclass
class Graph:
    """The nodes in the order in which they run; the last value is `output`."""

    nodes: list[Node]
    output: Any

    def layers(self) -> list[Layer]:
        return [node for node in self.nodes if isinstance(node, Layer)]


def substitute(tree: Any, values: dict[str, Any]) -> Any:
    """Nested arguments with every Ref replaced by its value."""
    match tree:
        case Ref(name):
            return values[name]
        case dict():
            return {key: substitute(value, values) for key, value in tree.items()}
        case list():
            return [substitute(value, values) for value in tree]
        case tuple():
            return tuple(substitute(value, values) for value in tree)
        case slice():
            return slice(*(substitute(part, values) for part in (tree.start, tree.stop, tree.step)))
    return tree


def references(tree: Any) -> list[str]:
    """The names of the nodes in nested arguments."""
    match tree:
        case Ref(name):
            return [name]
        case dict():
            return [name for value in tree.values() for name in references(value)]
        case list() | tuple():
            return [name for value in tree for name in references(value)]
        case slice():
            return references((tree.start, tree.stop, tree.step))
    return []


def rename(tree: Any, names: dict[str, str]) -> Any:
    """Nested arguments with the names of nodes replaced."""
    return substitute(tree, {name: Ref(names.get(name, name)) for name in references(tree)})
