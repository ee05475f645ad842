"""A network as a short list of nodes: plain data, whatever module it was exported from.

A node is a layer that this package executes itself (a convolution or a linear layer; pools stand in pools.py,
arithmetic on single elements in pointwise.py) or a call of one of torch's operations, which runs as it stands.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.graph.operators import operator_name, resolve
from str_triton.deploy.sparse.graph.refs import Ref, references, substitute

FREE = (-math.inf, math.inf)
# Activations that can be part of a layer, in the order in which vectors.h counts them from 1.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
}


@dataclass
class Node:
    """One value of the network: `inputs` are names of nodes before it.

    Attributes:
        variable: the shape of the value depends on the values of tensors, not on shapes alone.
    """

    name: str
    inputs: list[str]
    variable: bool = field(default=False, kw_only=True)

    @property
    def is_number(self) -> bool:
        """Check whether the value is a size or another number, not a tensor."""
        return False

    def run(self, values: dict[str, Any]) -> Any:
        """Compute the value with torch from those of the nodes before it."""
        raise NotImplementedError


@dataclass
class Input(Node):
    """A tensor that every call gives."""


@dataclass
class State(Node):
    """A buffer that calls change; it keeps its value from call to call.

    Attributes:
        value: the current value.
        label: the buffer's name in the model.
    """

    value: Tensor
    label: str = ""

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.value


@dataclass
class Constant(Node):
    """A tensor that the network holds."""

    value: Tensor

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.value


# In channels_last torch takes the variance of a group from the mean of squares: wrong by 1e-3 for values around 100.
_NORMS = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional")
_INACCURATE = frozenset(getattr(torch.ops.aten, name).default for name in (*_NORMS, "group_norm", "native_group_norm"))


@dataclass
class Call(Node):
    """An operation of torch for which there is no other kind of node.

    Attributes:
        target: an ATen operation or a function of Python's `operator`.
        label: the module that it belongs to.
    """

    target: Any
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def run(self, values: dict[str, Any]) -> Any:
        args = [values[arg.name] if type(arg) is Ref else substitute(arg, values) for arg in self.args]
        kwargs = substitute(self.kwargs, values) if self.kwargs else {}
        if self.target in _INACCURATE:
            args[0] = args[0].contiguous()
        return self.target(*args, **kwargs)

    @property
    def is_pure(self) -> bool:
        """Check whether the call can be dropped if its value is not read."""
        schema = getattr(self.target, "_schema", None)
        return schema is None or bool(schema.returns)

    @property
    def is_number(self) -> bool:
        schema = getattr(self.target, "_schema", None)
        if schema is None:
            return self.target is not operator.getitem
        return not any("Tensor" in str(value.type) for value in schema.returns)

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in getattr(self.target, "tags", ())

    @property
    def is_of_shapes(self) -> bool:
        """Check whether the value depends on the argument's shape alone."""
        return self.target in (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, with the operation's name in place of torch's operation, which cannot be pickled."""
        return vars(self) | {"target": operator_name(self.target) or self.target}

    def __setstate__(self, state: dict[str, Any]) -> None:
        target = state["target"]
        self.__dict__.update(state | {"target": resolve(target) if isinstance(target, str) else target})


@dataclass
class Layer(Node):
    """A weight layer: inputs are x and, if a sum is fused, the residual that is added before the clamp.

    Attributes:
        weight: float32, batch norm folded in; bias: [out].
        clamp: the lowest and highest value of the output.
        label: the module's name in the model, for people.
        activation: a name in ACTIVATIONS, which follows the clamp; "": none.
        slope: the factor of negative values of "leaky_relu".
    """

    weight: Tensor
    bias: Tensor
    clamp: tuple[float, float] = FREE
    label: str = ""
    dtypes: ClassVar[tuple[torch.dtype, torch.dtype]] = (torch.float32, torch.float32)  # of weight and bias
    activation: str = field(default="", kw_only=True)
    slope: float = field(default=0.01, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the forms of the weight that executions prepared: copies and files cannot hold them."""
        return {name: value for name, value in vars(self).items() if name != "prepared"}

    def prepare(self, name: str, make: Any) -> Tensor:
        """Return the weight in another form; `make(weight)` makes it once."""
        prepared = self.__dict__.setdefault("prepared", {})
        if name not in prepared:
            prepared[name] = make(self.weight)
        return prepared[name]

    def finish(self, y: Tensor, values: dict[str, Any]) -> Tensor:
        """Apply residual and activation to an output that has neither, in place where that is possible."""
        if len(self.inputs) > 1:
            y = y + values[self.inputs[1]]
        if self.clamp == (0.0, math.inf):
            y = y.relu_()
        elif self.clamp != FREE:
            y = y.clamp_(*self.clamp)
        return self.activate(y)

    def activate(self, y: Tensor) -> Tensor:
        """Apply the activation alone."""
        if self.activation == "leaky_relu":
            return F.leaky_relu(y, self.slope)
        return ACTIVATIONS[self.activation](y) if self.activation else y


Pair = tuple[int, int]


def output_sizes(sizes: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Return the height and the width of a window's output for an image of these sizes, rounded down."""
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    height, width = ((n + 2 * p - span) // s + 1 for n, span, s, p in zip(sizes, spans, stride, padding, strict=True))
    return height, width


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

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.weight.shape[0] > 1

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the convolution alone for an input [B, C, H, W] of this shape."""
        sizes = output_sizes(shape[2:], self.kernel, self.stride, self.padding, self.dilation)
        return shape[0], self.weight.shape[0], *sizes

    def run(self, values: dict[str, Any]) -> Tensor:
        x = values[self.inputs[0]]
        if self.groups > 1 and self.dilation != (1, 1):
            x = x.contiguous()  # Torch 2.13 crashes on some of these in channels_last.
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.finish(y, values)


@dataclass
class Linear(Layer):
    """A linear layer on the last dimension: weight [out, in]."""

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.finish(F.linear(values[self.inputs[0]], self.weight, self.bias), values)


@dataclass
class Graph:
    """The nodes in the order in which they run.

    Attributes:
        outputs: the values of a call, flat: a Ref, or a constant that is no tensor.
        changes: the values that inputs and states have after a call, by their names.
    """

    nodes: list[Node]
    outputs: list[Any]
    changes: dict[str, Ref] = field(default_factory=dict)

    def layers(self) -> list[Layer]:
        return [node for node in self.nodes if isinstance(node, Layer)]

    def inputs(self) -> list[Input]:
        return [node for node in self.nodes if isinstance(node, Input)]

    def kept(self) -> list[str]:
        """Return the names of the values that are read after the last node."""
        return references([self.outputs, self.changes])

    def readers(self) -> dict[str, list[Node]]:
        """Return the nodes that read each value, by its name."""
        found: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in set(node.inputs):
                found[name].append(node)
        return found

    def run(self, inputs: Iterable[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return outputs and changes for inputs in the order of `inputs()`, all by torch; the state stays as it is."""
        values: dict[str, Any] = {}
        for _, found in self.steps(inputs):
            values = found
        return substitute(self.outputs, values), substitute(self.changes, values)

    def steps(self, inputs: Iterable[Any]) -> Iterator[tuple[Node, dict[str, Any]]]:
        """Compute the nodes in turn, and yield each with the values so far, without those that are not read again."""
        values: dict[str, Any] = {}
        given = iter(inputs)
        last = {name: index for index, node in enumerate(self.nodes) for name in (node.name, *node.inputs)}
        last |= dict.fromkeys(self.kept(), len(self.nodes))
        for index, node in enumerate(self.nodes):
            values[node.name] = next(given) if isinstance(node, Input) else node.run(values)
            yield node, values
            for name in {node.name, *node.inputs}:
                if last[name] == index:
                    del values[name]
