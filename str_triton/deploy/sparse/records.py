"""Nodes and their arguments as JSON, and back from a file that is not trusted: every field is checked."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph import nodes, pools, quantized
from str_triton.deploy.sparse.graph.operators import allowed, operator_name, resolve, wrong_argument
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.quantized_recurrent import QuantizedRecurrent
from str_triton.deploy.sparse.graph.recurrent import Recurrent
from str_triton.deploy.sparse.graph.refs import Ref, references

MOST = 2**20  # the limit for a stride, a padding, a number of blocks: larger than any in use, too small to overflow
LARGEST = torch.finfo(torch.float32).max
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
_FORMATS = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")


class Refused(ValueError):
    """The error for a record that describes no network; the message says what is wrong with it."""


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON; a type that JSON lacks becomes {"type": ...}. Tensors are added to `tensors` under `key`.

    Raises ValueError for a value that a file cannot hold.
    """

    def parts(items: Any) -> list[Any]:
        return [encode(item, f"{key}.{index}", tensors) for index, item in enumerate(items)]

    match value:
        case Tensor():
            tensors[key] = value
            return {"tensor": key}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case Ref(name):
            return {"ref": name}
        case list():
            return parts(value)
        case tuple():
            return {"tuple": parts(value)}
        case dict() if all(isinstance(name, str) for name in value):
            return {"dict": {name: encode(item, f"{key}.{name}", tensors) for name, item in value.items()}}
        case slice():
            return {"slice": parts((value.start, value.stop, value.step))}
        case torch.dtype() if str(value).removeprefix("torch.") in _DTYPES:
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.memory_format() if str(value).removeprefix("torch.") in _FORMATS:
            return {"format": str(value).removeprefix("torch.")}
        case torch.device() if value.type == "cpu":
            return {"device": "cpu"}
        case torch.layout() if value is torch.strided:
            return {"layout": "strided"}
    what = getattr(value, "__name__", type(value).__name__)
    raise ValueError(f"{key} is a {what}, which a file cannot hold: torch.save keeps the network instead")


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `encode` turned into this JSON.

    Raises KeyError, TypeError or ValueError for JSON that `encode` does not make.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "float":
            return float(content)
        case "ref":
            return Ref(_string(content))
        case "tuple":
            return tuple(decode(item, tensors) for item in content)
        case "dict":
            return {name: decode(item, tensors) for name, item in content.items()}
        case "slice":
            return slice(*(decode(item, tensors) for item in content))
        case "dtype":
            return getattr(torch, _DTYPES[_DTYPES.index(content)])
        case "format":
            return getattr(torch, _FORMATS[_FORMATS.index(content)])
        case "device":
            return torch.device("cpu")
        case "layout":
            return torch.strided
    raise KeyError(kind)


def node_record(node: nodes.Node, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a node as JSON.

    Raises ValueError where a file cannot hold it.
    """
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if isinstance(node, nodes.Call):
        name = operator_name(node.target)
        if not allowed(name) or wrong_argument(node.target, node.args, node.kwargs):
            where = f"{node.label} calls" if node.label else "it calls"
            called = name or getattr(node.target, "__name__", node.target)
            raise ValueError(f"{where} {called}, which a file cannot hold: torch.save keeps the network instead")
        fields["target"] = name
    record = {name: encode(value, f"{node.name}|{name}", tensors) for name, value in fields.items()}
    return {"kind": type(node).__name__} | record


def node_of(record: dict[str, Any], tensors: dict[str, Tensor], known: set[str]) -> nodes.Node:
    """Return the node of a record; `known` are the names of the nodes before it.

    Raises Refused, KeyError, TypeError or ValueError for a record that describes no node.
    """
    kind, check = _KINDS[record["kind"]]
    node = kind(**{name: decode(value, tensors) for name, value in record.items() if name != "kind"})
    _require(isinstance(node.name, str) and node.name not in known, f"two nodes have the name {node.name!r}")
    if isinstance(node, nodes.Call):
        _require(allowed(node.target), f"{node.name} calls {node.target!r}")
        node.target = resolve(node.target)
        _require(isinstance(node.args, tuple) and isinstance(node.kwargs, dict), f"{node.name} has no arguments")
        wrong = wrong_argument(node.target, node.args, node.kwargs)
        _require(wrong is None, f"{node.name} calls {record['target']} with a wrong {wrong}")
        node.inputs = references((node.args, node.kwargs))
    _require(
        isinstance(node.inputs, list) and all(isinstance(name, str) for name in node.inputs),
        f"{node.name} has no inputs",
    )
    unknown = [name for name in node.inputs if name not in known]
    _require(not unknown, f"{node.name} reads {unknown[:1]}, which does not come before it")
    _require(
        isinstance(node.variable, bool) and isinstance(getattr(node, "label", ""), str),
        f"{node.name} is no {record['kind']}",
    )
    check(node)
    return node


def choice_of(record: dict[str, Any]) -> Choice:
    """Return the choice of a record; raises as `node_of` does."""
    choice = Choice(**record)
    _require(choice.execution in EXECUTIONS, f"{choice.execution!r} is no execution")
    for name in ("width", "tiles", "blocks"):
        _require(
            _is_size(getattr(choice, name), 1),
            f"width, tiles and blocks must be positive integers: {name}={getattr(choice, name)!r}",
        )
    times = [ms for ms in (choice.ms, choice.ms_dense) if ms is not None]
    _require(
        all(isinstance(ms, int | float) and not isinstance(ms, bool) and ms >= 0 for ms in times), "a time is none"
    )
    return choice


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Refused(message)


def _string(value: Any) -> str:
    _require(isinstance(value, str), f"{value!r} is no name")
    return value


def _is_size(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MOST


def _is_pair(value: Any, least: int) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_size(number, least) for number in value)


def _is_tensor(value: Any, dims: int, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.dim() == dims


def _is_layer(node: nodes.Layer, dims: int, most_inputs: int) -> bool:
    fits = all(map(_is_tensor, (node.weight, node.bias), (dims, 1), node.dtypes))
    fits = fits and node.bias.shape == node.weight.shape[:1]
    limits = (
        isinstance(node.clamp, tuple)
        and len(node.clamp) == 2
        and all(type(limit) in (int, float) for limit in node.clamp)
        and all(abs(limit) <= LARGEST or math.isinf(limit) for limit in node.clamp)
    )
    limits = limits and node.activation in ("", *nodes.ACTIVATIONS)
    limits = limits and type(node.slope) in (int, float) and abs(node.slope) <= LARGEST
    return fits and limits and node.clamp[0] <= node.clamp[1] and 1 <= len(node.inputs) <= most_inputs


def _check_convolution(node: nodes.Convolution) -> None:
    pairs = _is_pair(node.stride, 1) and _is_pair(node.padding, 0) and _is_pair(node.dilation, 1)
    sizes = pairs and _is_layer(node, 4, 2) and _is_size(node.groups, 1) and min(node.weight.shape) > 0
    _require(sizes and node.weight.shape[0] % node.groups == 0, f"{node.name} is no convolution")


def _check_pointwise(node: Pointwise) -> None:
    _check_convolution(node)
    plain = node.is_pointwise and node.dilation == (1, 1) and node.groups == len(node.weight)
    plain = plain and node.weight.shape[1] == 1 and isinstance(node.scales, bool)
    identity = plain and (node.scales or bool((node.weight == 1).all() and (node.bias == 0).all()))
    _require(identity, f"{node.name} is no product by channels")


def _check_linear(node: nodes.Linear) -> None:
    _require(_is_layer(node, 2, 1), f"{node.name} is no linear layer")


def _check_pool(node: pools.MaxPool | pools.AvgPool) -> None:
    pairs = all(_is_pair(pair, 1) for pair in (node.kernel, node.stride, node.dilation)) and _is_pair(node.padding, 0)
    small = pairs and all(2 * p <= k for p, k in zip(node.padding, node.kernel, strict=True))
    flags = isinstance(node.ceil, bool) and isinstance(getattr(node, "whole", True), bool)
    usual = small and flags and math.prod(node.kernel) <= MOST and len(node.inputs) == 1
    _require(usual, f"{node.name} is no pool")


def _check_mean(node: pools.Mean) -> None:
    _require(isinstance(node.keep, bool) and len(node.inputs) == 1, f"{node.name} is no mean")


def _is_grid(grid: quantized.Grid) -> bool:
    usual = type(grid.scale) is float and quantized.SMALLEST <= grid.scale <= LARGEST
    # The kernels would round a number that float32 cannot hold.
    exact = usual and float(torch.tensor(grid.scale, dtype=torch.float32)) == grid.scale
    return exact and type(grid.zero) is int and 0 <= grid.zero <= quantized.TOP


def _check_coder(node: quantized.Quantize | quantized.Dequantize) -> None:
    _require(_is_grid(node.grid) and len(node.inputs) == 1, f"{node.name} has no grid")


def _check_quantized_mean(node: quantized.QuantizedMean) -> None:
    _check_mean(node)
    _require(_is_grid(node.grid), f"{node.name} has no grid")


def _check_quantized_convolution(node: quantized.QuantizedConvolution) -> None:
    _check_convolution(node)
    before, table = node.before, node.table
    fits = before is None if table is None else before is not None and _is_grid(before)
    fits = fits and (table is None or (_is_tensor(table, 1, torch.uint8) and len(table) == quantized.TOP + 1))
    _require(fits, f"{node.name} has no table of 256 codes")
    _check_products(node, 1 + len(node.inputs))
    _require(node.residual_factor() <= quantized.MOST_FACTOR, f"{node.name} has scales beyond reason")


def _check_gate(node: quantized.QuantizedGate) -> None:
    fits = len(node.inputs) == len(node.grids) == 2 and all(map(_is_grid, node.grids))
    _require(fits and node.ratio() <= quantized.MOST_FACTOR, f"{node.name} has no grids")


def _check_quantized_linear(node: quantized.QuantizedLinear) -> None:
    _check_linear(node)
    _check_products(node, 1)


def _check_products(node: quantized.QuantizedConvolution | quantized.QuantizedLinear, grids: int) -> None:
    """Check the numbers of a quantized layer: sums must fit into int32, products into float32."""
    fits = _is_tensor(node.scale, 1, torch.float32) and node.scale.shape == node.bias.shape
    fits = fits and (node.activation == "" or getattr(node, "table", None) is not None)
    _require(fits and len(node.grids) == grids and all(map(_is_grid, node.grids)), f"{node.name} has no grids")
    sums = node.weight.numel() > 0 and int(node.weight.min()) >= -127 and node.span() < 2**31
    _require(sums, f"{node.name} has sums beyond 32 bits")
    usual = bool(((node.scale >= quantized.SMALLEST) & (node.scale <= LARGEST)).all())
    _require(usual and float(node.factors().max()) <= quantized.MOST_FACTOR, f"{node.name} has scales beyond reason")


def _check_held(node: nodes.State | nodes.Constant) -> None:
    _require(isinstance(node.value, Tensor) and not node.inputs, f"{node.name} holds no tensor")


def _check_input(node: nodes.Input) -> None:
    _require(not node.inputs, f"{node.name} is no input")


def _check_call(node: nodes.Call) -> None:
    pass


_KINDS: dict[str, tuple[type[nodes.Node], Callable[[Any], None]]] = {
    "Input": (nodes.Input, _check_input),
    "State": (nodes.State, _check_held),
    "Constant": (nodes.Constant, _check_held),
    "Call": (nodes.Call, _check_call),
    "Convolution": (nodes.Convolution, _check_convolution),
    "Linear": (nodes.Linear, _check_linear),
    "Recurrent": (Recurrent, Recurrent.check_fields),
    "QuantizedRecurrent": (QuantizedRecurrent, Recurrent.check_fields),
    "Pointwise": (Pointwise, _check_pointwise),
    "MaxPool": (pools.MaxPool, _check_pool),
    "AvgPool": (pools.AvgPool, _check_pool),
    "Mean": (pools.Mean, _check_mean),
    **{kind.__name__: (kind, _check_coder) for kind in (quantized.Quantize, quantized.Dequantize)},
    "QuantizedMean": (quantized.QuantizedMean, _check_quantized_mean),
    "QuantizedGate": (quantized.QuantizedGate, _check_gate),
    "QuantizedConvolution": (quantized.QuantizedConvolution, _check_quantized_convolution),
    "QuantizedLinear": (quantized.QuantizedLinear, _check_quantized_linear),
}
