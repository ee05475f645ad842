"""Passes over a graph: norms folded into the layers before them, residual sums and activations made part of them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from str_triton.deploy.sparse.graph import (
    KEEP,
    Add,
    Call,
    Clamp,
    Convolution,
    Graph,
    Layer,
    Node,
    Norm,
    Ref,
    references,
    rename,
)


def fuse(graph: Graph) -> Graph:
    """Fold norms, fuse sums and activations, and turn what could not be fused into calls."""
    graph = _fuse_sums(_absorb(graph, Norm, _fold_norm))
    graph = _drop_flattens(_absorb(graph, Clamp, _fuse_clamp))
    return Graph([_as_call(node) for node in graph.nodes], graph.output)


def _as_call(node: Node) -> Node:
    args = tuple(Ref(name) for name in node.inputs)
    match node:
        case Norm():
            return Call(node.name, node.inputs, "affine", (*args, node.scale, node.shift))
        case Clamp():
            return Call(node.name, node.inputs, "clamp", (*args, *node.clamp))
        case Add():
            return Call(node.name, node.inputs, "add", args)
    return node


def _users(graph: Graph) -> Counter[str]:
    return Counter([name for node in graph.nodes for name in node.inputs] + references(graph.output))


def _without(graph: Graph, merged: dict[str, Node]) -> Graph:
    """The graph after every node that is named in `merged` became part of the given one, which keeps its place."""
    names = {name: node.name for name, node in merged.items()}
    nodes = []
    for node in graph.nodes:
        if node.name in merged:
            continue
        node.inputs = [names.get(name, name) for name in node.inputs]
        if isinstance(node, Call):
            node.args, node.kwargs = rename((node.args, node.kwargs), names)
        nodes.append(node)
    return Graph(nodes, rename(graph.output, names))


def _producer(nodes: dict[str, Node], merged: dict[str, Node], name: str) -> Node:
    return merged.get(name) or nodes[name]


def _absorb(graph: Graph, kind: type[Node], change: Callable[[Layer, Any], None]) -> Graph:
    """Each node of a kind goes into the layer before it, if that has no other user: `change(layer, node)`."""
    users, nodes = _users(graph), {node.name: node for node in graph.nodes}
    merged: dict[str, Node] = {}
    for node in graph.nodes:
        layer = _producer(nodes, merged, node.inputs[0]) if isinstance(node, kind) else None
        if isinstance(layer, Layer) and users[node.inputs[0]] == 1:
            change(layer, node)
            merged[node.name] = layer
    return _without(graph, merged)


def _fold_norm(layer: Layer, norm: Norm) -> None:
    scale = norm.scale.double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    # A weight that is zero stays zero, whatever the scale: 0 * inf would fill the layer.
    layer.weight = torch.where(layer.weight == 0, 0.0, weight).float()
    layer.bias = (layer.bias.double() * scale + norm.shift.double()).float()


def _fuse_clamp(layer: Layer, clamp: Clamp) -> None:
    (low, high), (lower, upper) = layer.clamp, clamp.clamp
    layer.clamp = (min(max(low, lower), upper), max(min(high, upper), lower))


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


def _drop_flattens(graph: Graph) -> Graph:
    """A mean that keeps its dimensions, and is then flattened, is the mean that does not."""
    nodes = {node.name: node for node in graph.nodes}
    merged: dict[str, Node] = {}
    for node in graph.nodes:
        if isinstance(node, Call) and node.target in ("flatten", ".flatten") and len(node.inputs) == 1:
            options = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
            kept = nodes[node.inputs[0]]
            if options.get("start_dim") == 1 and options.get("end_dim", -1) == -1 and _keeps(kept):
                merged[node.name] = nodes[kept.inputs[0]]
    graph = _without(graph, merged)
    users = _users(graph)
    return Graph([node for node in graph.nodes if users[node.name] or not _keeps(node)], graph.output)


def _keeps(node: Node) -> bool:
    return isinstance(node, Call) and node.args[1:] == (KEEP,)
