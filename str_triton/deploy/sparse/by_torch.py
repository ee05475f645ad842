"""Executions of a layer by torch: dense in two memory formats, and as a compressed sparse matrix."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.calls import FUNCTIONS
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.graph import Call, Constant, Convolution, Graph, Input, Layer, Linear, Node, substitute


def run_torch(node: Node, values: dict[str, Any], choice: Choice | None) -> Any:
    """The value of a node, computed by torch."""
    if isinstance(node, Call):
        return node.run(values, FUNCTIONS)
    if isinstance(node, Constant):
        return node.value
    if choice is None or choice.execution in ("dense", "sparse"):
        return node.run(values)
    x = values[node.inputs[0]]
    if choice.execution == "channels_last":
        if isinstance(node, Linear):
            return node.run(values)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = _formatted(node)
        y = F.conv2d(x, weight, node.bias, node.stride, node.padding, node.dilation, node.groups)
        return node.finish(y, values)
    return node.finish(_csr_product(node, x), values)


def run(graph: Graph, x: Tensor) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The output for x, dense, and the shape of each value that is a tensor."""
    values: dict[str, Any] = {}
    shapes = {}
    for node in graph.nodes:
        values[node.name] = x if isinstance(node, Input) else run_torch(node, values, None)
        if isinstance(values[node.name], Tensor):
            shapes[node.name] = tuple(values[node.name].shape)
    return substitute(graph.output, values), shapes


def infer_shapes(graph: Graph, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each value that is a tensor for an input like x, by one run."""
    return run(graph, torch.zeros_like(x))[1]


def can_be_csr(node: Layer) -> bool:
    """Whether a layer is one product of its weight as a matrix with its input."""
    return isinstance(node, Linear) or (isinstance(node, Convolution) and node.is_pointwise and node.groups == 1)


def _formatted(node: Convolution) -> Tensor:
    return _prepared(node, "channels_last", lambda weight: weight.contiguous(memory_format=torch.channels_last))


def _csr(node: Layer) -> Tensor:
    return _prepared(node, "csr", _to_csr)


def _to_csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return weight.flatten(1).to_sparse_csr()


def _prepared(node: Layer, name: str, make: Any) -> Tensor:
    """The weight in another form, made once."""
    prepared = node.__dict__.setdefault("prepared", {})
    if name not in prepared:
        prepared[name] = make(node.weight)
    return prepared[name]


def _csr_product(node: Layer, x: Tensor) -> Tensor:
    weight = _csr(node)
    if isinstance(node, Linear):
        y = torch.sparse.mm(weight, x.reshape(-1, x.shape[-1]).t().contiguous()).t()
        return y.reshape(*x.shape[:-1], -1) + node.bias
    images = [torch.sparse.mm(weight, image.reshape(image.shape[0], -1)) for image in x]
    y = torch.stack(images) if len(images) != 1 else images[0].unsqueeze(0)
    return y.add_(node.bias.view(-1, 1)).view(x.shape[0], -1, *x.shape[2:])
