"""Passes over a graph: norms folded into the layers before them, residual sums and activations made part of them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from str_triton.deploy.sparse.graph.nodes import Add, Call, Clamp, Convolution, Graph, Input, Layer, Linear, Node, Norm
from str_triton.deploy.sparse.graph.refs import Ref, rename

_ACTIVATIONS = {
    getattr(torch.ops.aten, name).default: name for name in ("hardswish", "hardsigmoid", "sigmoid", "silu", "gelu")
}


def fuse(graph: Graph) -> Graph:
    """Fold norms, fuse sums and activations, turn what could not be fused into calls, and drop what nobody reads."""
    graph = _fuse_sums(_absorb(graph, Norm, _fold_norm))
    graph = _absorb(graph, Clamp, _fuse_clamp)
    graph = _absorb(graph, Call, _fuse_activation)
    nodes = [node.as_call() if isinstance(node, Norm | Clamp | Add) else node for node in graph.nodes]
    return _without_unread(Graph(nodes, graph.outputs, graph.changes))


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
    """Return the graph after every node named in `merged` became part of the given one, which keeps its place."""
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


def _fuse_clamp(layer: Layer, clamp: Clamp) -> bool:
    (low, high), (lower, upper) = layer.clamp, clamp.clamp
    layer.clamp = (min(max(low, lower), upper), max(min(high, upper), lower))
    return True


def _fuse_activation(layer: Layer, call: Call) -> bool:
    name = _ACTIVATIONS.get(call.target, "")
    approximate = call.kwargs.get("approximate", "none")
    if name == "gelu" and approximate == "tanh":
        name = "gelu_tanh"
    is_plain = call.args == (Ref(call.inputs[0]),) and call.kwargs.keys() <= {"approximate"}
    if not name or not is_plain or layer.activation:
        return False
    layer.activation = name
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
