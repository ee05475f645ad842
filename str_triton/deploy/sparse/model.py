"""`compile_sparse`: a network with zeros in its weights, made fast on this machine's processor."""

import copy
import os
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.deploy.plain_state import unwrapped
from str_triton.deploy.sparse import file
from str_triton.deploy.sparse.build import library
from str_triton.deploy.sparse.by_torch import infer_shapes
from str_triton.deploy.sparse.choice import Choice
from str_triton.deploy.sparse.graph import Call, Graph, Layer
from str_triton.deploy.sparse.modulewise import layer_graph, layer_inputs, put
from str_triton.deploy.sparse.plan import Plan
from str_triton.deploy.sparse.timing import choose, profile
from str_triton.deploy.sparse.trace import NotTraceable, left_to_torch, trace
from str_triton.nn import densify

PLANS = 8  # shapes whose buffers are kept, the youngest
_PRODUCTS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


class CompiledModel(nn.Module):
    """What compiled networks share: they infer, on the CPU, in float32, and print how each layer is executed.

    Attributes:
        left: the layers that torch executes as they stand, with the reason.
    """

    left: dict[str, str]

    def train(self, mode: bool = True) -> "CompiledModel":
        if mode:
            raise ValueError("a network made by compile_sparse is for inference: train the model it was made from")
        return super().train(False)

    def __str__(self) -> str:
        return self.table()

    def _layers(self) -> Iterable[tuple[Layer, Choice]]:
        raise NotImplementedError

    def table(self) -> str:
        """A line for each layer.

        The share of its weights that are not zero, its execution, and the milliseconds that torch's fastest dense
        execution and this one took alone, for the example's shape.
        """
        rows = [("layer", "nonzero", "executed", "dense ms", "chosen ms")]
        for node, choice in self._layers():
            density = int(node.weight.count_nonzero()) / max(1, node.weight.numel())
            times = [f"{ms:.3f}" if ms is not None else "" for ms in (choice.ms_dense, choice.ms)]
            rows.append((node.label, f"{100 * density:.2f} %", choice.execution, *times))
        rows += [(name, "", f"by torch: {reason}", "", "") for name, reason in self.left.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


class SparseModel(CompiledModel):
    """A network that runs from a plan: [B, C, H, W] or whatever the model took, of any size that it takes.

    Buffers are planned for each new shape of the input when it first comes; the choices stay those of the example's.
    Several threads of Python may call one network: they take turns. Its weights are no parameters, and its state dict
    is empty: `save` keeps it, and so does torch.save.
    """

    def __init__(self, graph: Graph, choices: dict[str, Choice], left: dict[str, str]) -> None:
        super().__init__()
        self.graph, self.choices, self.left = graph, choices, left
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._lock = threading.Lock()
        self.training = False

    def forward(self, x: Tensor) -> Any:
        _check(x)
        with torch.no_grad(), self._lock:
            return self._plan(x).run(x)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network with its choices to `path`: `load_sparse` reads it, `python -m str_triton inspect` too.

        Raises:
            ValueError: the network calls something that a file cannot hold; the message names it.
            OSError: the file cannot be written; `path` is as it was.
        """
        file.write(path, self.graph, self.choices, self.left)

    def profile(self, x: Tensor) -> list[tuple[str, str, float]]:
        """What takes the time for inputs like x: (layer, kind, milliseconds) of every step, measured one by one.

        Kinds are "convolution", "depthwise", "linear", "pool", "copy" (into and out of padded buffers, and into the
        phases that strided layers read) and "torch".
        """
        self(x)
        with torch.no_grad(), self._lock:
            return profile(self._plan(x), x.clone())

    def _layers(self) -> Iterable[tuple[Layer, Choice]]:
        return ((node, self.choices[node.name]) for node in self.graph.layers())

    def _plan(self, x: Tensor) -> Plan:
        shape = tuple(x.shape)
        if shape not in self._plans:
            if len(self._plans) == PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[shape] = Plan(self.graph, infer_shapes(self.graph, x), self.choices, library())
        return self._plans[shape]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_plans", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._lock = {}, threading.Lock()


class ModulewiseModel(CompiledModel):
    """A model whose forward could not be traced, with its layers compiled one by one."""

    def __init__(self, model: nn.Module, layers: dict[str, SparseModel], left: dict[str, str]) -> None:
        super().__init__()
        self.model, self.left = model, left
        for name, layer in layers.items():
            put(model, name, layer)
        self.names = list(layers)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        raise ValueError(
            f"{type(self.model).__name__} could not be traced, and a file cannot hold its forward: "
            "torch.save keeps the network instead"
        )

    def _layers(self) -> Iterable[tuple[Layer, Choice]]:
        return (pair for name in self.names for pair in self.model.get_submodule(name).compiled._layers())


def compile_sparse(model: nn.Module, example_input: Tensor) -> CompiledModel:
    """A copy of `model` for inference on the CPU in which every layer has the fastest execution that is exact.

    Batch norms are folded into the convolution or linear layer before them, ReLU, ReLU6, biases and residual sums
    become part of it, and for every convolution and linear layer the executions are timed on this machine with the
    real shapes: dense by torch (contiguous or channels_last), CSR by torch.sparse, and a sparse microkernel of our own
    in C, which the system's compiler compiles once per machine (none: torch alone, with one warning). The zeros decide,
    not the type of the layer. Outputs differ from the model's by rounding, 1e-4 at most for networks of usual scale;
    a weight of zero is not multiplied, so that an infinite or NaN pixel spoils only what reads it.

    Threads are `torch.get_num_threads()` of them, here and at every call: compile with the number that you will use.

    Args:
        model: plain, or with layers of `sparsify`; it stays as it is. A forward that torch.fx cannot trace is kept,
            and its layers are compiled one by one.
        example_input: float32 on the CPU, of the shape that matters; others work, too, each planned when it comes.

    Returns:
        A module with `str(...)` or `.table()`, one line per layer, `.profile(x)` and `.save(path)`; layers that torch
        must execute as they are (transposed and 1-d convolutions, other padding modes) are in `.left`.

    Raises:
        TypeError, ValueError: an example that is no float32 tensor on the CPU, a model with other parameters, or one
            that does not take the example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile_sparse takes a module, got {type(model).__name__}")
    _check(example_input)
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"compile_sparse takes float32 on the CPU, and {name} is {parameter.dtype} on {parameter.device}: "
                "model.float().cpu() first"
            )
    try:
        model = densify(copy.deepcopy(model)).eval()
    except RuntimeError as error:  # A weight that a hook computes, as torch.nn.utils.prune has it.
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error}); masks of torch.nn.utils.prune become part of the "
            "weights by its `remove`"
        ) from error
    if isinstance(model, nn.Conv2d | nn.Linear):  # In the table it needs a name.
        model = nn.Sequential(model)
    left = left_to_torch(model)
    with torch.no_grad():
        try:
            expected = model(example_input.clone())
        except Exception as error:  # Shapes fail in many ways, in a second argument that is missing, too.
            shape = tuple(example_input.shape)
            raise ValueError(f"{type(model).__name__} does not take an example of shape {shape}: {error}") from error
        try:
            return _compile(trace(model, example_input, expected), example_input, left)
        except NotTraceable:
            layers = {
                name: _compile(layer_graph(model.get_submodule(name), name), x, {})
                for name, x in layer_inputs(model, example_input).items()
            }
            return ModulewiseModel(model, layers, left)


def load_sparse(path: str | os.PathLike[str]) -> SparseModel:
    """A network that `save` wrote, with its choices; without a compiler for the kernels, torch executes all layers.

    Raises:
        ValueError: the file is damaged, holds no compiled network, or one of another version.
        OSError: the file cannot be read.
    """
    return SparseModel(*file.read(path))


def _compile(graph: Graph, example: Tensor, left: dict[str, str]) -> SparseModel:
    called = [node for node in graph.nodes if isinstance(node, Call) and not isinstance(node.target, str)]
    names = {node.name: getattr(node.target, "__name__", "") for node in called}
    left = left | {name: f"{function} called by name" for name, function in names.items() if function in _PRODUCTS}
    choices = choose(graph, infer_shapes(graph, example), example, library())
    return SparseModel(graph, choices, left)


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"a compiled network takes one tensor, got {type(x).__name__}")
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"a compiled network takes float32 on the CPU, got {x.dtype} on {x.device}")
