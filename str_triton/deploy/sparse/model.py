"""`compile_sparse`: a network with zeros in its weights, made fast on this machine's processor."""

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.deploy.sparse.build import library
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.graph import Graph
from str_triton.deploy.sparse.plan import Plan
from str_triton.deploy.sparse.shapes import infer_shapes
from str_triton.deploy.sparse.timing import choose
from str_triton.deploy.sparse.trace import trace
from str_triton.nn import densify


class SparseModel(nn.Module):
    """What `compile_sparse` returns: for inference on the CPU, float32, inputs of any size that the network takes.

    Buffers are planned for each new shape of the input when it first comes; the choices stay those of the example's.
    """

    def __init__(self, graph: Graph, choices: dict[str, Choice], dense_layers: dict[str, str]) -> None:
        super().__init__()
        self.graph, self.choices, self.dense_layers = graph, choices, dense_layers
        self._plans: dict[tuple, Plan] = {}
        self._lock = threading.Lock()
        self.training = False

    def forward(self, x: Tensor) -> Any:
        _check_input(x)
        with torch.inference_mode(), self._lock:
            return self._plan(x).run(x)

    def train(self, mode: bool = True) -> "SparseModel":
        if mode:
            raise ValueError("a model made by compile_sparse is for inference: train the model that it was made from")
        return self

    def _plan(self, x: Tensor) -> Plan:
        shape = tuple(x.shape)
        if shape not in self._plans:
            self._plans[shape] = Plan(self.graph, infer_shapes(self.graph, x), self.choices, library())
        return self._plans[shape]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plans": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._lock = {}, threading.Lock()

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Layer, share of weights that are not zero, choice, milliseconds of the fastest dense execution and of it."""
        rows = [("layer", "nonzero", "choice", "dense ms", "chosen ms")]
        for node in self.graph.layers():
            choice = self.choices[node.name]
            density = int(node.weight.count_nonzero()) / max(1, node.weight.numel())
            times = [f"{ms:.3f}" if ms is not None else "" for ms in (choice.ms_dense, choice.ms)]
            rows.append((node.label, f"{100 * density:.2f} %", choice.execution, *times))
        rows += [(name, "", f"left to torch: {reason}", "", "") for name, reason in self.dense_layers.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def compile_sparse(model: nn.Module, example_input: Tensor) -> nn.Module:
    """A copy of `model` for inference, executed in the fastest exact way that this machine has for each layer."""
    _check_input(example_input)
    model = densify(copy.deepcopy(model)).eval()
    with torch.inference_mode():
        graph = trace(model, example_input)
        shapes = infer_shapes(graph, example_input)
        choices = choose(graph, shapes, example_input, library())
    return SparseModel(graph, choices, {})


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"the input must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"the input must be float32 on the CPU, got {x.dtype} on {x.device}")
