"""From a module to a graph of plain data: torch.fx traces the forward, what this package executes becomes its nodes."""

import math
import operator
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from str_triton.deploy.sparse.by_torch import run
from str_triton.deploy.sparse.calls import ATTRIBUTES, FUNCTIONS, IDENTITIES, MODULES, NAMES, VIEWS, Method
from str_triton.deploy.sparse.fuse import fuse
from str_triton.deploy.sparse.graph import (
    FREE,
    KEEP,
    Add,
    Call,
    Clamp,
    Constant,
    Convolution,
    Graph,
    Input,
    Linear,
    MaxPool,
    Mean,
    Node,
    Norm,
    Ref,
    references,
)


class NotTraceable(Exception):
    """The forward cannot be written as a graph; the message says why."""


ROOT = "model."  # what torch.fx puts before the names of the model's modules
_ADDS = (operator.add, operator.iadd, torch.add)
_RELU = (0.0, math.inf)
_CLAMPS = {**dict.fromkeys((F.relu, torch.relu, F.relu_, torch.relu_), _RELU), F.relu6: (0.0, 6.0)}
# Methods that mean the same as a function.
_SAME = {"relu": torch.relu, "relu_": torch.relu_, "add": torch.add, "add_": operator.iadd, "mean": torch.mean}


def trace(model: nn.Module, example: Tensor, expected: Any) -> Graph:
    """The graph of a dense model in eval mode, fused; `expected` is what the model gives for the example.

    Raises:
        NotTraceable: torch.fx cannot follow the forward, or its graph gives something else: a branch that it took
            wrongly, a view whose base changed in place.
    """
    try:
        # Inside another module, so that the model is called as users call it: its hooks and optional arguments count.
        traced = fx.symbolic_trace(nn.Sequential(OrderedDict(model=model)))
    except Exception as error:  # Whatever the forward does with a proxy: there is no common class.
        raise NotTraceable(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
    graph = fuse(_Builder(traced, _dimensions(traced, example)).build())
    if not _agree(run(graph, example.clone())[0], expected):
        raise NotTraceable(f"what torch.fx traced of {type(model).__name__} computes something else")
    return graph


def _agree(found: Any, expected: Any) -> bool:
    """Whether two outputs are the same but for rounding, which a wrong trace's are not."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        scale = float(expected.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
        return torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_agree(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_agree, found, expected))
    return found == expected


def supported(module: nn.Module) -> str | None:
    """Why a convolution or linear layer is left to torch; None if it is not."""
    if _is_hooked(module):
        return "it has forward hooks"
    if type(module) is nn.Linear:
        return None
    if type(module) is not nn.Conv2d:
        return type(module).__name__
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if _padding(module) is None:
        return "padding='same' on one side only"
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def left_to_torch(model: nn.Module) -> dict[str, str]:
    """The convolution and linear layers that are not `supported`, with the reason."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase)
    reasons = {name: supported(module) for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: reason for name, reason in reasons.items() if reason}


def layer(module: nn.Conv2d | nn.Linear, name: str, inputs: list[str], label: str) -> Convolution | Linear:
    """The node of a layer that is `supported`."""
    weight = module.weight.detach().contiguous()
    bias = torch.zeros(weight.shape[0]) if module.bias is None else module.bias.detach().clone()
    if isinstance(module, nn.Linear):
        return Linear(name, inputs, weight, bias, FREE, label)
    geometry = (module.stride, _padding(module), module.dilation, module.groups)
    return Convolution(name, inputs, weight, bias, FREE, label, *geometry)


def _padding(module: nn.Conv2d) -> tuple[int, int] | None:
    if not isinstance(module.padding, str):
        return module.padding
    totals = [
        d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)
    ]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


def _dimensions(traced: fx.GraphModule, example: Tensor) -> dict[str, int]:
    """How many dimensions each value has, by one run; none for what is no tensor."""

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, Tensor):
                dimensions[node.name] = value.dim()
            return value

    dimensions: dict[str, int] = {}
    with torch.no_grad():
        Recorder(traced).run(example.clone())  # An in-place layer may come first.
    return dimensions


class _Builder:
    """Turns the nodes of torch.fx into ours, one by one."""

    def __init__(self, traced: fx.GraphModule, dimensions: dict[str, int]) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.dimensions = dimensions
        self.values: dict[str, Any] = {}  # By the name of torch.fx: a Ref, or a constant that is no tensor.
        self.nodes: list[Node] = []

    def build(self) -> Graph:
        output: Any = None
        for node in self.traced.graph.nodes:
            if node.op == "output":
                output = self._arguments(node.args[0])
            else:
                self._add(node)
        return Graph(self.nodes, output)

    def _add(self, node: fx.Node) -> None:
        args, kwargs = self._arguments(node.args), self._arguments(node.kwargs)
        inputs = references((args, kwargs))
        in_place = False
        match node.op:
            case "placeholder":
                made: Node = Input(node.name, [])
            case "get_attr":
                made = Constant(node.name, [], _attribute(self.traced, node.target).detach())
            case "call_module" if type(module := self.modules[node.target]) in IDENTITIES and not _is_hooked(module):
                self.values[node.name] = args[0]
                return
            case "call_module":
                module = self.modules[node.target]
                in_place = getattr(module, "inplace", False)
                made = self._module(node, module, inputs, args, kwargs)
            case _:
                called = str(getattr(node.target, "__name__", node.target))
                in_place = called.endswith("_") or called in ("iadd", "imul") or kwargs.get("inplace", False)
                made = self._function(node, inputs, args, kwargs)
        self.nodes.append(made)
        self.values[node.name] = Ref(made.name)
        if in_place and inputs and _is_view(self.nodes, inputs[0]):
            raise NotTraceable(f"{node.name} changes a view of a value in place")
        if in_place and inputs:  # Whoever reads the argument later reads what became of it.
            for name, value in self.values.items():
                if value == Ref(inputs[0]):
                    self.values[name] = Ref(made.name)

    def _module(self, node: fx.Node, module: nn.Module, inputs: list[str], args: tuple, kwargs: dict) -> Node:
        name, dims = node.name, self.dimensions.get(node.name)
        if _is_hooked(module):
            return Call(name, inputs, module, args, kwargs)
        if len(args) == len(inputs) == 1 and not kwargs:
            match module:
                case nn.Conv2d() | nn.Linear() if supported(module) is None and (
                    dims == 4 or type(module) is nn.Linear
                ):
                    return layer(module, name, inputs, node.target.removeprefix(ROOT))
                case nn.BatchNorm2d() | nn.BatchNorm1d() if module.running_mean is not None and dims in (2, 4):
                    return Norm(name, inputs, *_scale_and_shift(module))
                case nn.ReLU():
                    return Clamp(name, inputs, (0.0, math.inf))
                case nn.Hardtanh():  # ReLU6 is one.
                    return Clamp(name, inputs, (float(module.min_val), float(module.max_val)))
                case nn.MaxPool2d() if dims == 4 and not (module.ceil_mode or module.return_indices):
                    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
                    return MaxPool(name, inputs, *map(_pair, sizes))
                case nn.AdaptiveAvgPool2d() if dims == 4 and _pair(module.output_size) == (1, 1):
                    return self._mean(name, inputs, keep=True)
        if type(module) in MODULES:
            function, keywords = MODULES[type(module)]
            return Call(name, inputs, function, args, kwargs | {key: getattr(module, key) for key in keywords})
        return Call(name, inputs, module, args, kwargs)

    def _function(self, node: fx.Node, inputs: list[str], args: tuple, kwargs: dict) -> Node:
        name, dims = node.name, self.dimensions.get(node.name)
        target = node.target
        if node.op == "call_method":
            target = _SAME.get(target, f".{target}")
        sources = [self.dimensions.get(argument.name) for argument in node.args if isinstance(argument, fx.Node)]
        rest = (*args[1:], *(value for key, value in kwargs.items() if key != "inplace"))
        if len(inputs) == 1 and not rest and target in _CLAMPS:
            return Clamp(name, inputs, _CLAMPS[target])
        if target in _ADDS and len(args) == 2 and sources == [dims, dims] and not kwargs:
            return Add(name, inputs)
        if target is F.adaptive_avg_pool2d and len(inputs) == 1 and dims == 4 and _pair(rest[0]) == (1, 1):
            return self._mean(name, inputs, keep=True)
        if target is torch.mean and sources == [4] and set(kwargs) <= {"dim", "keepdim"}:
            dim, keep = (*args[1:], kwargs.get("dim"), kwargs.get("keepdim", False))[:2] if rest else (None, False)
            if isinstance(dim, list | tuple) and sorted(d % 4 for d in dim) == [2, 3]:
                return self._mean(name, inputs, keep)
        if isinstance(target, str):
            return Call(name, inputs, target if target in FUNCTIONS else Method(target[1:]), args, kwargs)
        if target is getattr and args[1] in ATTRIBUTES:
            return Call(name, inputs, "getattr", args, kwargs)
        return Call(name, inputs, NAMES.get(target, target), args, kwargs)

    def _mean(self, name: str, inputs: list[str], keep: bool) -> Node:
        if not keep:
            return Mean(name, inputs)
        self.nodes.append(Mean(f"{name}.mean", inputs))
        shape = (Ref(f"{name}.mean"), KEEP)
        return Call(name, [f"{name}.mean"], "operator.getitem", shape)

    def _arguments(self, tree: Any) -> Any:
        return fx.node.map_arg(tree, lambda node: self.values[node.name])


def _attribute(root: nn.Module, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _is_view(nodes: list[Node], name: str) -> bool:
    """Whether a value may share memory with another."""
    node = next(node for node in nodes if node.name == name)
    return isinstance(node, Call) and isinstance(node.target, str) and node.target in VIEWS


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _scale_and_shift(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.detach().double(), shift * norm.weight.detach().double()
        shift = shift + norm.bias.detach().double()
    return scale.float(), shift.float()
