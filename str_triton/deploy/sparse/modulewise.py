"""For a model whose forward cannot be traced: each of its layers is compiled by itself, the rest runs as it is."""

from typing import Any

import torch
from torch import Tensor, nn

from str_triton.deploy.sparse.graph import Graph, Input, Ref
from str_triton.deploy.sparse.trace import layer, supported


def layer_inputs(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """The input of every convolution and linear layer that is called with one tensor, by the layer's name."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and supported(module) is None and name:

            def remember(module: nn.Module, args: tuple, name: str = name) -> None:
                if len(args) == 1 and isinstance(args[0], Tensor) and args[0].dtype == torch.float32:
                    inputs[name] = args[0].clone()

            handles.append(module.register_forward_pre_hook(remember))
    try:
        model(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def layer_graph(module: nn.Conv2d | nn.Linear, label: str) -> Graph:
    """One layer as a network."""
    return Graph([Input("x", []), layer(module, "y", ["x"], label)], Ref("y"))


def put(model: nn.Module, name: str, module: Any) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
