"""The conversion of a graph in float32 to one in which chosen layers run on 8-bit integers."""

from dataclasses import replace

import torch

from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Graph, Layer, Linear, Node
from str_triton.deploy.sparse.graph.pools import MaxPool, Mean
from str_triton.deploy.sparse.graph.quantized import (
    MOST_FACTOR,
    SMALLEST,
    TOP,
    Dequantize,
    Grid,
    Quantize,
    QuantizedConvolution,
    QuantizedLinear,
    QuantizedMean,
)
from str_triton.deploy.sparse.graph.refs import rename
from str_triton.deploy.sparse.runtime.images import Channels, Parts, Shapes, image_operation

LARGEST = 127  # the largest absolute int8 weight: symmetric
MOST_BIAS = 2**29  # what the int32 sums leave for the bias
MOST_REACH = 2**29  # and for the products: they are summed before the zero points are taken off, and after


def unfit(node: Layer, shapes: Shapes) -> str | None:
    """Return why a layer cannot run on integers; None if it can."""
    if type(node) not in (Convolution, Linear):
        return f"layers of the kind {type(node).__name__.lower()} have no form on integers"
    if node.activation:
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

    A max pool, a concatenation and a slice copy codes, so their inputs and outputs have one grid.
    """
    parents = {node.name: node.name for node in graph.nodes}

    def root(name: str) -> str:
        while parents[name] != name:
            name = parents[name]
        return name

    for node in graph.nodes:
        if isinstance(node, MaxPool) or isinstance(image_operation(node, shapes), Parts | Channels):
            for name in node.inputs:
                parents[root(name)] = root(node.name)
    return {name: root(name) for name in parents}


def quantized(
    node: Layer, grids: dict[str, Grid], name: str, inputs: list[str]
) -> QuantizedConvolution | QuantizedLinear:
    """Return a layer on integers, for inputs and an output of these grids.

    Raises ValueError where its numbers do not fit into int32.
    """
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
    made = QuantizedConvolution(**fixed, **weights, **geometry, grids=every)
    if not (float(made.factors().max()) <= MOST_FACTOR and made.residual_factor() <= MOST_FACTOR):
        raise ValueError("its scales are beyond reason")
    return made


class Converter:
    """The rewriting of a graph: values that chosen layers read or make become codes, and float32 for other readers.

    Args:
        graph: a network in float32.
        chosen: the names of the layers that run on integers.
        grids: the grid of each value that may become codes.
        shapes: the shapes of its values for the example.
    """

    def __init__(self, graph: Graph, chosen: set[str], grids: dict[str, Grid], shapes: Shapes) -> None:
        self.chosen, self.grids, self.shapes = chosen, grids, shapes
        self.codes: dict[str, str] = {}  # the nodes that hold a value's codes, by the value's name
        self._names = {node.name for node in graph.nodes}
        self._floats: set[str] = set()
        self._nodes: list[Node] = []
        for node in graph.nodes:
            self._add(node)
        for name in graph.kept():
            self._float(name)
        self.graph = Graph(self._nodes, graph.outputs, graph.changes)

    def _add(self, node: Node) -> None:
        first = node.inputs[0] if node.inputs else ""
        if node.name in self.chosen:
            inputs = [self._code(name) for name in node.inputs]
            name = node.name if isinstance(node, Linear) else self._new(node.name)
            self._nodes.append(quantized(node, self.grids, name, inputs))
            if isinstance(node, Linear):
                self._floats.add(node.name)
        elif isinstance(node, MaxPool) and first in self.codes:
            self._nodes.append(replace(node, name=self._new(node.name), inputs=[self.codes[first]]))
        elif isinstance(node, Mean) and first in self.codes:
            self._nodes.append(QuantizedMean(node.name, [self.codes[first]], node.keep, grid=self.grids[first]))
            self._floats.add(node.name)
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
            self._nodes.append(node)
            self._floats.add(node.name)

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


def convert(graph: Graph, chosen: set[str], grids: dict[str, Grid], shapes: Shapes) -> tuple[Graph, dict[str, str]]:
    """Return the graph on integers, and the names of the nodes that hold codes by the names of their values."""
    converter = Converter(graph, chosen, grids, shapes)
    return converter.graph, converter.codes
