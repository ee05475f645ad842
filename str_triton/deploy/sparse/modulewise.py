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


class Replaced(nn.Module):
    """A compiled layer in the place of a plain one, whose attributes it has: a forward may read `layer.weight`."""

    def __init__(self, plain: nn.Module, compiled: nn.Module) -> None:
        super().__init__()
        self.plain, self.compiled = plain, compiled

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("plain"), name)


def put(model: nn.Module, name: str, compiled: nn.Module) -> None:
    """Put a compiled layer in the place of the plain one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Replaced(model.get_submodule(name), compiled))
