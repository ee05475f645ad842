"""`torch.compile(model, backend="str_sparse")`: Dynamo's guards and graph breaks in front of `compile_sparse`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from str_triton.deploy.sparse.compile import compile_sparse
from str_triton.deploy.sparse.graph.signature import Unfit
from str_triton.deploy.sparse.model import CompiledModel
from str_triton.deploy.sparse.runtime.limits import require_memory
from str_triton.deploy.sparse.surroundings import is_watched


def str_sparse(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph of Dynamo for inference on the CPU. With gradients, the graph runs unchanged.

    Weights and buffers are taken as they are at the first call, and again after a change in place.

    Args:
        graph, example_inputs: what Dynamo gives a backend.
        options: {"tune": False} to choose the executions without timing them.
    """
    return torch.compiler.disable(_Frozen(graph, example_inputs, dict(options or {})))


class _Frozen:
    """A graph with its weights, compiled at the first call, when the values of the weights are known."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> None:
        self._graph, self._options = graph, options
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._static = [
            i
            for i, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True))
            if isinstance(example, nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        ]
        self._network: CompiledModel | None = None
        self._state: list[tuple[int, int]] = []

    def __call__(self, *args: Any) -> Any:
        weights = [args[i] for i in self._static] + list(self._graph.parameters()) + list(self._graph.buffers())
        others = [arg for i, arg in enumerate(args) if i not in self._static]
        tensors = [arg for arg in others if isinstance(arg, Tensor)]
        needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, *tensors))
        is_ours = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in weights if t.is_floating_point())
        if needs_gradients or not is_ours or not tensors or torch.is_autocast_enabled("cpu"):
            return self._graph(*args)
        state = [(id(weight), weight._version) for weight in weights]
        if not is_watched():  # Torch's own operations would end the process.
            for tensor in tensors:
                require_memory(tensor)
        if self._network is None or state != self._state:
            self._network = _compiled(self._graph, self._static, args, others, self._options)
            self._state = [(id(weight), weight._version) for weight in weights]
        if self._network is None:
            return self._graph(*args)
        try:
            return self._network(*others)
        except Unfit:
            return self._graph(*args)


def _compiled(
    graph: fx.GraphModule, static: list[int], args: tuple, others: list[Any], options: dict[str, Any]
) -> CompiledModel | None:
    """Return the compiled graph; None where `compile_sparse` does not take it, for example with inputs in float64."""
    module = _WithWeights(graph, static, {i: args[i] for i in static})
    try:
        return compile_sparse(module, tuple(others), tune=options.get("tune", True))
    except (TypeError, ValueError):
        return None


class _WithWeights(nn.Module):
    """A graph that has its weights, and takes the other arguments."""

    def __init__(self, graph: fx.GraphModule, static: list[int], weights: dict[int, Tensor]) -> None:
        super().__init__()
        self.graph, self.static = graph, static
        for i, weight in weights.items():
            if isinstance(weight, nn.Parameter):
                self.register_parameter(f"weight{i}", weight)
            else:
                self.register_buffer(f"weight{i}", weight)

    def forward(self, *others: Any) -> Any:
        given = iter(others)
        count = len(others) + len(self.static)
        return self.graph(*(getattr(self, f"weight{i}") if i in self.static else next(given) for i in range(count)))
