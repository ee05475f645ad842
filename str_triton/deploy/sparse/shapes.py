"""The shape of every value, by running the network once."""

from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.by_torch import run_torch
from str_triton.deploy.sparse.graph import Graph, Input


def infer_shapes(graph: Graph, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each value that is a tensor, for an input like x."""
    values: dict[str, Any] = {}
    shapes = {}
    for node in graph.nodes:
        values[node.name] = torch.zeros_like(x) if isinstance(node, Input) else run_torch(node, values, None)
        if isinstance(values[node.name], Tensor):
            shapes[node.name] = tuple(values[node.name].shape)
    return shapes
