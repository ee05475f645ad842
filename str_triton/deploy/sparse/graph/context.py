"""The state of a lowering, and functions that read the nodes of an exported program."""

from typing import Any

import torch
from torch import Tensor, fx

from str_triton.deploy.sparse.graph.nodes import Constant, Node
from str_triton.deploy.sparse.graph.refs import Ref


class Context:
    """The state of a lowering.

    Attributes:
        nodes: this package's nodes so far.
        values: by exported node, a Ref, a constant that is no tensor, or a list of these for several results.
        known: tensors that depend on weights alone.
        labels: the modules that weights belong to.
        rows: of a recurrent layer's states [B, hidden], the same as [1, B, hidden].
        left: the layers that torch executes unchanged, with the reason.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[fx.Node, Any] = {}
        self.labels: dict[fx.Node, str] = {}
        self.rows: dict[Ref, Ref] = {}
        self.left: dict[str, str] = {}
        self.prefix = ""
        self._constants: dict[fx.Node, Ref] = {}

    def add(self, node: fx.Node, made: Node) -> None:
        self.nodes.append(made)
        self.values[node] = Ref(made.name)

    def arguments(self, tree: Any) -> Any:
        """Return an exported node's arguments with references to this package's nodes."""
        return fx.node.map_arg(tree, self.value)

    def value(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        if node not in self._constants:
            name = f"{self.prefix}{node.name}"
            self.nodes.append(Constant(name, [], self.known[node]))
            self._constants[node] = Ref(name)
        return self._constants[node]

    def name(self, node: fx.Node) -> str:
        return f"{self.prefix}{node.name}"

    def label(self, node: fx.Node, weight: fx.Node | None = None) -> str:
        """Return the name in the model of the module that a node belongs to."""
        stack = node.meta.get("nn_module_stack") or {}
        path = next((str(value[0]) for value in reversed(stack.values())), "")
        path = path.removeprefix("L['self']").lstrip(".")
        return path or self.labels.get(weight, "") or self.name(node)

    def is_weight(self, node: Any, dims: int) -> bool:
        """Check that an argument is a float32 tensor of so many dimensions that depends on weights alone."""
        tensor = self.known.get(node) if isinstance(node, fx.Node) else None
        return isinstance(tensor, Tensor) and tensor.dim() == dims and tensor.dtype == torch.float32

    def is_bias(self, node: Any) -> bool:
        """Check that an argument is absent or a vector that depends on weights alone."""
        return node is None or self.is_weight(node, 1)


def is_float(node: Any) -> bool:
    """Check that the value of an exported node, or its first result, is a float32 tensor."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) else value
    return isinstance(value, Tensor) and value.dtype == torch.float32


def bound(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen node by name, with the schema's defaults."""
    given = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            given[argument.name] = node.args[index]
        else:
            given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return given


def dimensions(node: Any) -> int | None:
    """Return how many dimensions the tensor of an exported node has."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def channels(node: fx.Node) -> int:
    """Return the channels of an exported node's tensor [images, channels, height, width]; 0 for other values."""
    value = node.meta.get("val")
    found = value.shape[1] if isinstance(value, Tensor) and value.dim() == 4 else 0
    return found if isinstance(found, int) else 0


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Check that two shapes are the same for all values of the open sizes."""
    return a.dim() == b.dim() and all(map(_same_size, a.shape, b.shape))


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return getattr(getattr(a, "node", None), "expr", a) == getattr(getattr(b, "node", None), "expr", b)


def pair(value: Any) -> tuple[Any, Any]:
    """Return an argument for two dimensions as a pair."""
    both = tuple(value) if isinstance(value, list | tuple) else (value, value)
    return both if len(both) == 2 else both * 2
