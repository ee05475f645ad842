"""Passes over a graph: norms folded into the layers before them, residual sums and activations made part of them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from str_triton.deploy.sparse.graph.branches import merge_branches
from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Graph, Input, Layer, Linear, Node
from str_triton.deploy.sparse.graph.pointwise import Activation, Add, Norm
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool
from str_triton.deploy.sparse.graph.refs import rename


def fuse(graph: Graph) -> Graph:
    """Fold norms, fuse sums and activations, turn the rest of them into calls, and drop values that are not read."""
    graph = _absorb(graph, Norm, _fold_norm)
    graph = _absorb(_without(graph, merge_branches(graph, _users(graph))), Norm, _fold_norm)
    graph = _fuse_sums(_beside_images(graph, Norm))
    graph = _beside_images(_absorb(_beside_images(graph, Add), Activation, _fuse_activation), Activation)
    nodes = [node.as_call() if isinstance(node, Norm | Activation | Add) else node for node in graph.nodes]
    return _without_unread(Graph(nodes, graph.outputs, graph.changes))


def _beside_images(graph: Graph, kind: type[Norm | Activation | Add]) -> Graph:
    """Turn the arithmetic of this kind beside convolutions and pools into layers, which the kernels can execute."""
    images = {node.name for node in graph.nodes if isinstance(node, Convolution | MaxPool | AvgPool)}
    read = {name for node in graph.nodes if node.name in images for name in node.inputs}
    nodes = []
    for node in graph.nodes:
        is_arithmetic = isinstance(node, Norm | Activation | Add) and bool(node.channels)
        if is_arithmetic and (node.name in read or images & set(node.inputs)):
            images.add(node.name)
            if isinstance(node, kind):
                layer = node.as_layer()
                layer.variable = node.variable
                node = layer
        nodes.append(node)
    return Graph(nodes, graph.outputs, graph.changes)


def _users(graph: Graph) -> Counter[str]:
    return Counter([name for node in graph.nodes for name in node.inputs] + graph.kept())


def _without_unread(graph: Graph) -> Graph:
    read, nodes = set(graph.kept()) | set(graph.changes), []
    for node in reversed(graph.nodes):
        effect = isinstance(node, Input) or (isinstance(node, Call) and not node.is_pure)
        if effect or node.name in read:
            read.update(node.inputs)
            nodes.append(node)
    return Graph(nodes[::-1], graph.outputs, graph.changes)


def _without(graph: Graph, merged: dict[str, Node]) -> Graph:
    """Return the graph without the nodes in `merged`: their readers read the node that each became part of."""
    names = {name: node.name for name, node in merged.items()}
    nodes = []
    for node in graph.nodes:
        if node.name in merged:
            continue
        node.inputs = [names.get(name, name) for name in node.inputs]
        if isinstance(node, Call):
            node.args, node.kwargs = rename((node.args, node.kwargs), names)
        nodes.append(node)
    return Graph(nodes, rename(graph.outputs, names), rename(graph.changes, names))


def _producer(nodes: dict[str, Node], merged: dict[str, Node], name: str) -> Node:
    return merged.get(name) or nodes[name]


def _absorb(graph: Graph, kind: type[Node], change: Callable[[Layer, Any], bool]) -> Graph:
    """Let each node of a kind become part of the layer before it, if that has no other user and `change` agrees."""
    users, nodes = _users(graph), {node.name: node for node in graph.nodes}
    merged: dict[str, Node] = {}
    for node in graph.nodes:
        layer = _producer(nodes, merged, node.inputs[0]) if isinstance(node, kind) and node.inputs else None
        if isinstance(layer, Layer) and users[node.inputs[0]] == 1 and change(layer, node):
            merged[node.name] = layer
    return _without(graph, merged)


def _fold_norm(layer: Layer, norm: Norm) -> bool:
    if isinstance(layer, Linear) and norm.dims != 2:  # The norm's channels are not the layer's outputs.
        return False
    scale = norm.scale
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    # A weight that is zero stays zero, whatever the scale: 0 * inf would fill the layer.
    layer.weight = torch.where(layer.weight == 0, 0.0, weight).float()
    layer.bias = (layer.bias.double() * scale + norm.shift).float()
    return True


def _fuse_activation(layer: Layer, node: Activation) -> bool:
    if layer.activation:
        return False
    layer.activation, layer.slope = node.activation, node.slope
    (low, high), (lower, upper) = layer.clamp, node.clamp
    layer.clamp = (min(max(low, lower), upper), max(min(high, upper), lower))
    return True


def _fuse_sums(graph: Graph) -> Graph:
    users, nodes = _users(graph), {node.name: node for node in graph.nodes}
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    merged: dict[str, Node] = {}
    for node in graph.nodes:
        if not isinstance(node, Add):
            continue
        producers = [_producer(nodes, merged, name) for name in node.inputs]
        first, last = sorted(producers, key=lambda producer: place[producer.name])
        sole = users[node.inputs[producers.index(last)]] == 1
        if first is not last and sole and isinstance(last, Convolution) and len(last.inputs) == 1:
            last.inputs = [last.inputs[0], first.name]
            merged[node.name] = last
    return _without(graph, merged)
