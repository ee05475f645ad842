"""One run of a network with torch, which finds the shapes of its values for a plan."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import Call, Constant, Graph, Input, Node


@dataclass
class Trial:
    """The shapes of a network's values, and its constant values, for inputs of given shapes.

    Attributes:
        shapes: the shapes of the float32 tensors whose shape does not depend on the values of tensors.
        codes: the shapes of the uint8 tensors of this kind: codes of quantized values.
        fixed: the values that follow from the shapes of the inputs alone: sizes, positions, constants.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    codes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)

    def every(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of float32 tensors and of codes."""
        return self.shapes | self.codes


def try_out(graph: Graph, inputs: Sequence[Tensor]) -> Trial:
    """Run a network with torch, without changing its state."""
    trial = Trial()
    values: dict[str, Any] = {}
    given = iter(inputs)
    reads = [set(node.inputs) for node in graph.nodes]
    last = {name: index for index, names in enumerate(reads) for name in names}
    variable = {node.name for node in graph.nodes if node.variable}
    for index, node in enumerate(graph.nodes):
        value = next(given) if isinstance(node, Input) else node.run(values)
        values[node.name] = value
        if isinstance(value, Tensor) and not node.variable and _is_plain(value):
            kind = trial.codes if value.dtype == torch.uint8 else trial.shapes
            kind[node.name] = tuple(value.shape)
        if _is_fixed(node, trial, variable):
            trial.fixed[node.name] = value
        for name in (*reads[index], node.name):
            if last.get(name, index) == index:
                del values[name]
    return trial


def _is_plain(value: Tensor) -> bool:
    return value.dtype in (torch.float32, torch.uint8) and value.device.type == "cpu" and value.layout is torch.strided


def _is_fixed(node: Node, trial: Trial, variable: set[str]) -> bool:
    if isinstance(node, Constant):
        return True
    if not isinstance(node, Call) or not node.is_pure or node.is_random:
        return False
    if node.is_of_shapes:
        return node.inputs[0] not in variable
    return all(name in trial.fixed for name in node.inputs)
