"""A compiled network as a packed file: its tensors, and its graph and choices as JSON; reading one runs nothing."""

import dataclasses
import math
import os
import warnings
from typing import Any

from torch import Tensor

from str_triton.deploy.pack import inspect, pack, unpack
from str_triton.deploy.sparse import graph as nodes
from str_triton.deploy.sparse.calls import FUNCTIONS
from str_triton.deploy.sparse.choice import EXECUTIONS, Choice

FORMAT, VERSION = "str_triton.sparse", 1
_NODES = {
    kind.__name__: kind
    for kind in (
        *(nodes.Input, nodes.Constant, nodes.Call, nodes.Convolution, nodes.Linear),
        *(nodes.MaxPool, nodes.Mean),
    )
}


def write(path: str | os.PathLike[str], graph: nodes.Graph, choices: dict[str, Choice], left: dict[str, str]) -> None:
    """Write the file beside `path` and rename it into place.

    Raises:
        ValueError: a node calls something that a file cannot hold; the message names it.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "nodes": [_node_record(node, tensors) for node in graph.nodes],
        "output": _encode(graph.output, "output", tensors),
        "choices": {name: dataclasses.asdict(choice) for name, choice in choices.items()},
        "left": left,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # A network without zeros is stored dense, and that is right.
        pack(tensors, path, metadata={"sparse": record}, plain_zeros=True)


def read(path: str | os.PathLike[str]) -> tuple[nodes.Graph, dict[str, Choice], dict[str, str]]:
    """What `write` wrote.

    Raises:
        ValueError: the file is damaged, holds no compiled network, or one of another version.
        OSError: the file cannot be read.
    """
    record = inspect(path).metadata.get("sparse")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} holds no compiled network: compile_sparse(...).save(path) writes one")
    if record["version"] != VERSION:
        raise ValueError(f"{path} has version {record['version']} of compiled networks, this is for version {VERSION}")
    tensors = unpack(path)
    try:
        graph = nodes.Graph([_node(entry, tensors) for entry in record["nodes"]], _decode(record["output"], tensors))
        choices = {name: _choice(entry) for name, entry in record["choices"].items()}
        missing = [node.name for node in graph.layers() if node.name not in choices]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} describes no network: {error!r}") from error
    if missing:
        raise ValueError(f"{path} names no execution for {missing[0]}")
    return graph, choices, dict(record["left"])


def _choice(entry: dict[str, Any]) -> Choice:
    choice = Choice(**entry)
    if choice.execution not in EXECUTIONS:
        raise KeyError(choice.execution)
    if not all(type(n) is int and n > 0 for n in (choice.width, choice.tiles, choice.blocks)):
        raise TypeError(f"width, tiles and blocks must be positive integers: {choice}")
    return choice


def _node_record(node: nodes.Node, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(node, nodes.Call) and not isinstance(node.target, str):
        called = getattr(node.target, "__name__", type(node.target).__name__)
        raise ValueError(f"{node.name} calls {called}, which a file cannot hold: torch.save keeps the network instead")
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {"kind": type(node).__name__} | {
        name: _encode(value, f"{node.name}|{name}", tensors) for name, value in fields.items()
    }


def _node(entry: dict[str, Any], tensors: dict[str, Tensor]) -> nodes.Node:
    fields = {name: _decode(value, tensors) for name, value in entry.items() if name != "kind"}
    node = _NODES[entry["kind"]](**fields)
    if isinstance(node, nodes.Call) and node.target not in FUNCTIONS:
        raise KeyError(node.target)
    return node


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; what JSON lacks as {"its type": ...}. Tensors go to `tensors` under `key`."""

    def parts(items: Any) -> list[Any]:
        return [_encode(item, f"{key}.{index}", tensors) for index, item in enumerate(items)]

    match value:
        case Tensor():
            tensors[key] = value
            return {"tensor": key}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case nodes.Ref(name):
            return {"ref": name}
        case list():
            return parts(value)
        case tuple():
            return {"tuple": parts(value)}
        case dict():
            return {"dict": {name: _encode(item, f"{key}.{name}", tensors) for name, item in value.items()}}
        case slice():
            return {"slice": parts((value.start, value.stop, value.step))}
    if value is Ellipsis:
        return {"ellipsis": None}
    raise ValueError(
        f"{key} is a {type(value).__name__}, which a file cannot hold: torch.save keeps the network instead"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "float":
            return float(content)
        case "ref":
            return nodes.Ref(content)
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "dict":
            return {name: _decode(item, tensors) for name, item in content.items()}
        case "slice":
            return slice(*(_decode(item, tensors) for item in content))
        case "ellipsis":
            return ...
    raise KeyError(kind)
