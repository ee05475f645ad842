"""The conversion of a graph in float32 to one in which chosen layers run on 8-bit integers."""

import math
from dataclasses import replace
from typing import Any

import torch

from str_triton.deploy.sparse.graph.nodes import FREE, Call, Convolution, Graph, Layer, Linear, Node
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool, Mean
from str_triton.deploy.sparse.graph.quantized import (
    LARGEST,
    MOST_FACTOR,
    SMALLEST,
    TOP,
    Dequantize,
    Grid,
    Quantize,
    QuantizedConvolution,
    QuantizedGate,
    QuantizedLinear,
    QuantizedMean,
)
from str_triton.deploy.sparse.graph.quantized_recurrent import QuantizedRecurrent, quantized_recurrent
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.graph.refs import Ref, rename
from str_triton.deploy.sparse.runtime.images import (
    PAD,
    Channels,
    Gate,
    Parts,
    Shapes,
    has_window,
    image_operation,
    padded_image,
)

MOST_BIAS = 2**29  # what the int32 sums leave for the bias
MOST_REACH = 2**29  # and for the products: they are summed before the zero points are taken off, and after


def unfit(node: Layer, shapes: Shapes) -> str | None:
    """Return why a layer cannot run on integers; None if it can."""
    if isinstance(node, Recurrent):
        tensors = [node.weight] if node.v is None else [node.weight, node.v]
        return None if all(bool(tensor.isfinite().all()) for tensor in tensors) else "its weights are not finite"
    if type(node) not in (Convolution, Pointwise, Linear):
        return f"layers of the kind {type(node).__name__.lower()} have no form on integers"
    if node.activation and isinstance(node, Linear):
        return f"its activation is {node.activation}"
    if node.variable or any(name not in shapes for name in (node.name, *node.inputs)):
        return "its shape depends on values"
    if isinstance(node, Linear) and (len(shapes[node.inputs[0]]) != 2 or len(node.inputs) > 1):
        return "its input has more than two dimensions"
    if isinstance(node, Convolution) and any(len(shapes[name]) != 4 for name in node.inputs):
        return "its input has no batch"
    if isinstance(node, Convolution) and any(shapes[name] != shapes[node.name] for name in node.inputs[1:]):
        return "its residual is broadcast"
    if not bool(node.weight.isfinite().all() and node.bias.isfinite().all()) or not node.weight.numel():
        return "its weights are not finite"
    return None


def alike(graph: Graph, shapes: Shapes) -> dict[str, str]:
    """Return for each value the one that represents all values with the same grid.

    A pool, a concatenation, a slice and zeros around an image make no new range, so their inputs and outputs have one
    grid.
    """
    parents = {node.name: node.name for node in graph.nodes}

    def root(name: str) -> str:
        while parents[name] != name:
            name = parents[name]
        return name

    for node in graph.nodes:
        joined: list[str] = []
        if isinstance(node, MaxPool) or isinstance(image_operation(node, shapes), Parts | Channels):
            joined = node.inputs
        elif (isinstance(node, AvgPool) and has_window(node, shapes)) or padded_image(node, shapes):
            joined = node.inputs[:1]
        for name in joined:
            parents[root(name)] = root(node.name)
    return {name: root(name) for name in parents}


def quantized(
    node: Layer, grids: dict[str, Grid], name: str, inputs: list[str], before: Grid | None = None
) -> QuantizedConvolution | QuantizedLinear | QuantizedRecurrent:
    """Return a layer on integers, for inputs and an output of these grids; `before`: that of its activation's input.

    Raises ValueError where its numbers do not fit into int32.
    """
    if isinstance(node, Recurrent):
        return quantized_recurrent(node)
    flat = node.weight.flatten(1).double()
    scale = (flat.abs().amax(1) / LARGEST).float()
    scale = torch.where(scale < SMALLEST, torch.ones_like(scale), scale)
    codes = torch.round(flat / scale.double()[:, None]).clamp(-LARGEST, LARGEST).to(torch.int8).view(node.weight.shape)
    ours = [grids[value] for value in node.inputs]
    bias = torch.round(node.bias.double() / (scale.double() * ours[0].scale))
    reach = TOP * int(codes.flatten(1).to(torch.int16).abs().sum(1, dtype=torch.int64).max())
    if float(bias.abs().max()) > MOST_BIAS or reach > MOST_REACH:
        raise ValueError("its sums do not fit into int32")
    weights = {"weight": codes, "bias": bias.to(torch.int32), "scale": scale}
    fixed = {"name": name, "inputs": inputs, "clamp": node.clamp, "label": node.label}
    if isinstance(node, Linear):
        return QuantizedLinear(**fixed, **weights, grids=tuple(ours))
    geometry = {key: getattr(node, key) for key in ("stride", "padding", "dilation", "groups")}
    every = (ours[0], grids[node.name], *ours[1:])
    table: dict[str, Any] = {}
    if node.activation and before is not None:
        every_code = torch.arange(TOP + 1, dtype=torch.uint8, device="cpu")
        table = {"table": grids[node.name].encode(node.activate(before.decode(every_code))), "before": before}
        table |= {"activation": node.activation, "slope": node.slope}
    made = QuantizedConvolution(**fixed, **weights, **geometry, **table, grids=every)
    if not (float(made.factors().max()) <= MOST_FACTOR and made.residual_factor() <= MOST_FACTOR):
        raise ValueError("its scales are beyond reason")
    return made


def averaged(node: AvgPool, channels: int, grid: Grid, name: str, inputs: list[str]) -> QuantizedConvolution:
    """Return an average pool on codes, as a depthwise convolution whose weights are all 1."""
    weight = torch.ones((channels, 1, *node.kernel), dtype=torch.int8, device="cpu")
    bias = torch.zeros(channels, dtype=torch.int32, device="cpu")
    scale = torch.full((channels,), 1 / math.prod(node.kernel), dtype=torch.float32, device="cpu")
    geometry = (node.stride, node.padding, node.dilation, channels)
    return QuantizedConvolution(name, inputs, weight, bias, FREE, node.name, *geometry, scale=scale, grids=(grid, grid))


class Converter:
    """The rewriting of a graph: values that chosen layers read or make become codes, and float32 for other readers.

    Args:
        graph: a network in float32.
        chosen: the names of the layers that run on integers.
        grids: the grid of each value that may become codes.
        befores: the grids of what activations in layers are applied to, by the layers' names.
        shapes: the shapes of its values for the example.
    """

    def __init__(
        self, graph: Graph, chosen: set[str], grids: dict[str, Grid], befores: dict[str, Grid], shapes: Shapes
    ) -> None:
        self.chosen, self.grids, self.befores, self.shapes = chosen, grids, befores, shapes
        self.codes: dict[str, str] = {}  # the nodes that hold a value's codes, by the value's name
        self._names = {node.name for node in graph.nodes}
        self._readers = graph.readers()
        self._floats: set[str] = set()
        self._nodes: list[Node] = []
        for node in graph.nodes:
            self._add(node)
        for name in graph.kept():
            self._float(name)
        self.graph = Graph(self._nodes, graph.outputs, graph.changes)

    def make(self, node: Layer, name: str, inputs: list[str]) -> Layer:
        """Return a chosen layer on integers."""
        return quantized(node, self.grids, name, inputs, self.befores.get(node.name))

    def _add(self, node: Node) -> None:
        first = node.inputs[0] if node.inputs else ""
        if node.name in self.chosen and not isinstance(node, Recurrent):
            inputs = [self._code(name) for name in node.inputs]
            name = node.name if isinstance(node, Linear) else self._new(node.name)
            self._nodes.append(self.make(node, name, inputs))
            if isinstance(node, Linear):
                self._floats.add(node.name)
        elif isinstance(node, MaxPool) and first in self.codes:
            self._nodes.append(replace(node, name=self._new(node.name), inputs=[self.codes[first]]))
        elif isinstance(node, AvgPool) and first in self.codes and has_window(node, self.shapes):
            channels, inputs = self.shapes[first][1], [self.codes[first]]
            self._nodes.append(averaged(node, channels, self.grids[first], self._new(node.name), inputs))
        elif isinstance(node, Mean) and first in self.codes:
            self._nodes.append(QuantizedMean(node.name, [self.codes[first]], node.keep, grid=self.grids[first]))
            self._floats.add(node.name)
        elif isinstance(node, Call) and padded_image(node, self.shapes) and self._is_code(node):
            # The value around an image of codes is the code of zero.
            args = (Ref(self._code(first)), node.args[1], self.grids[first].zero)
            inputs = [self.codes[first], *node.inputs[1:]]
            self._nodes.append(Call(self._new(node.name), inputs, PAD, args, label=node.label))
        elif (gate := self._gate(node)) is not None:
            self._float(gate.factors)
            inputs, grids = [self.codes[gate.image], gate.factors], (self.grids[gate.image], self.grids[node.name])
            self._nodes.append(QuantizedGate(self._new(node.name), inputs, grids))
        elif self._moves_codes(node):
            names = {name: self._code(name) for name in node.inputs}
            args = rename(node.args, names)
            made = Call(
                self._new(node.name), [names[name] for name in node.inputs], node.target, args, label=node.label
            )
            self._nodes.append(made)
        else:
            for name in node.inputs:
                self._float(name)
            is_chosen = isinstance(node, Recurrent) and node.name in self.chosen  # Its values stay float32.
            self._nodes.append(self.make(node, node.name, node.inputs) if is_chosen else node)
            self._floats.add(node.name)

    def _is_code(self, node: Call) -> bool:
        """Check whether a call puts zeros around codes, or only layers on integers read the result."""
        readers = self._readers[node.name]
        return node.inputs[0] in self.codes or (bool(readers) and {reader.name for reader in readers} <= self.chosen)

    def _gate(self, node: Node) -> Gate | None:
        """Return the parts of a product of an image of codes and factors by channel that may become codes."""
        found = image_operation(node, self.shapes)
        usual = isinstance(found, Gate) and found.image in self.codes and node.name in self.grids
        return found if usual else None

    def _moves_codes(self, node: Node) -> bool:
        is_copy = isinstance(image_operation(node, self.shapes), Parts | Channels)
        return is_copy and any(name in self.codes for name in node.inputs)

    def _new(self, name: str) -> str:
        """Return the name of a new node for a value's codes."""
        code = f"{name}.u8"
        while code in self._names:
            code += "_"
        self._names.add(code)
        self.codes[name] = code
        return code

    def _code(self, name: str) -> str:
        if name not in self.codes:
            self._nodes.append(Quantize(self._new(name), [name], self.grids[name]))
        return self.codes[name]

    def _float(self, name: str) -> None:
        if name not in self._floats:
            self._nodes.append(Dequantize(name, [self.codes[name]], self.grids[name]))
            self._floats.add(name)


def convert(
    graph: Graph, chosen: set[str], grids: dict[str, Grid], befores: dict[str, Grid], shapes: Shapes
) -> tuple[Graph, dict[str, str]]:
    """Return the graph on integers, and the names of the nodes that hold codes by the names of their values."""
    converter = Converter(graph, chosen, grids, befores, shapes)
    return converter.graph, converter.codes


class Edges(Converter):
    """The rewriting without quantizing layers, for callers that only count the nodes between layers."""

    def make(self, node: Layer, name: str, inputs: list[str]) -> Layer:
        return replace(node, name=name, inputs=inputs)
