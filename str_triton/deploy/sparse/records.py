"""Nodes and their arguments as JSON, and back from a file that is not trusted: every field is checked."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.checks import KINDS, is_size, require
from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph import nodes
from str_triton.deploy.sparse.graph.operators import allowed, operator_name, resolve, wrong_argument
from str_triton.deploy.sparse.graph.refs import Ref, references

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
_FORMATS = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")


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
    kind, check = KINDS[record["kind"]]
    node = kind(**{name: decode(value, tensors) for name, value in record.items() if name != "kind"})
    require(isinstance(node.name, str) and node.name not in known, f"two nodes have the name {node.name!r}")
    if isinstance(node, nodes.Call):
        require(allowed(node.target), f"{node.name} calls {node.target!r}")
        node.target = resolve(node.target)
        require(isinstance(node.args, tuple) and isinstance(node.kwargs, dict), f"{node.name} has no arguments")
        wrong = wrong_argument(node.target, node.args, node.kwargs)
        require(wrong is None, f"{node.name} calls {record['target']} with a wrong {wrong}")
        node.inputs = references((node.args, node.kwargs))
    require(
        isinstance(node.inputs, list) and all(isinstance(name, str) for name in node.inputs),
        f"{node.name} has no inputs",
    )
    unknown = [name for name in node.inputs if name not in known]
    require(not unknown, f"{node.name} reads {unknown[:1]}, which does not come before it")
    require(
        isinstance(node.variable, bool) and isinstance(getattr(node, "label", ""), str),
        f"{node.name} is no {record['kind']}",
    )
    check(node)
    return node


def choice_of(record: dict[str, Any]) -> Choice:
    """Return the choice of a record; raises as `node_of` does."""
    choice = Choice(**record)
    require(choice.execution in EXECUTIONS, f"{choice.execution!r} is no execution")
    for name in ("width", "tiles", "blocks"):
        require(
            is_size(getattr(choice, name), 1),
            f"width, tiles and blocks must be positive integers: {name}={getattr(choice, name)!r}",
        )
    times = [ms for ms in (choice.ms, choice.ms_dense) if ms is not None]
    require(all(isinstance(ms, int | float) and not isinstance(ms, bool) and ms >= 0 for ms in times), "a time is none")
    return choice


def _string(value: Any) -> str:
    require(isinstance(value, str), f"{value!r} is no name")
    return value
