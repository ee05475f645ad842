"""Runs of a network with torch: one finds the shapes of its values for a plan, one needs no memory for them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from str_triton.deploy.sparse.graph.nodes import Call, Constant, Graph, Node
from str_triton.deploy.sparse.graph.refs import substitute
from str_triton.deploy.sparse.quiet import quiet
from str_triton.deploy.sparse.runtime.limits import check_memory


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
    variable = {node.name for node in graph.nodes if node.variable}
    for node, values in graph.steps(inputs):
        value = values[node.name]
        if isinstance(value, Tensor) and not node.variable and _is_plain(value):
            kind = trial.codes if value.dtype == torch.uint8 else trial.shapes
            kind[node.name] = tuple(value.shape)
        if _is_fixed(node, trial, variable):
            trial.fixed[node.name] = value
    return trial


def dry_run(
    graph: Graph, shapes: Iterable[Sequence[int]], dtypes: Iterable[torch.dtype]
) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """Run a network on tensors without values; return its inputs, outputs and changes.

    Raises TooLarge for a value that would take too much memory, and whatever an operation raises where parts do not fit
    together.
    """
    fields = pytree.tree_leaves([list(vars(node).values()) for node in graph.nodes])
    held = sum(field.nbytes for field in fields if isinstance(field, Tensor))
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), quiet():
        given = [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in zip(shapes, dtypes, strict=True)]
        held += sum(tensor.nbytes for tensor in given)
        values: dict[str, Any] = {}
        for node, found in graph.steps(given):
            values = found
            for part in pytree.tree_leaves(values[node.name]):
                sizes = part.shape if isinstance(part, Tensor) else ()
                if all(type(size) is int for size in sizes):  # Others depend on the values of tensors.
                    nbytes = math.prod(sizes) * (part.element_size() if sizes else 1)
                    check_memory(f"{node.name}, a tensor of {list(sizes)},", nbytes, held)
        return given, substitute(graph.outputs, values), substitute(graph.changes, values)


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
