"""A compiled network as a packed file: tensors, and JSON for graph and choices. Reading one executes no code of it."""

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from str_triton.deploy.pack import inspect, pack, unpack
from str_triton.deploy.sparse.checks import Refused, require
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Graph, Input, State
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.graph.signature import Leaf, Signature
from str_triton.deploy.sparse.records import choice_of, decode, encode, node_of, node_record
from str_triton.deploy.sparse.runtime.limits import TooLarge, check_memory
from str_triton.deploy.sparse.runtime.trial import dry_run
from str_triton.machine import processor

FORMAT, VERSION, READABLE = "str_triton.sparse", 3, (2, 3)


@dataclass
class Content:
    """The content of a file.

    Attributes:
        example: the shapes of the tensors that the choices were made for.
        processor: the processor that the choices were made on.
    """

    graph: Graph
    signature: Signature
    choices: dict[str, Choice]
    left: dict[str, str]
    notes: list[str]
    example: list[tuple[int, ...]]
    processor: str = field(default_factory=processor)


def write(path: str | os.PathLike[str], content: Content, metadata: Mapping[str, Any]) -> None:
    """Write the file beside `path` and rename it into place, with further `metadata` for JSON.

    Raises:
        ValueError: a node calls something that a file cannot hold; the message names it.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    graph = content.graph
    record = {
        "format": FORMAT,
        "version": VERSION,
        "nodes": [node_record(node, tensors) for node in graph.nodes],
        "outputs": encode(graph.outputs, "outputs", tensors),
        "changes": encode(graph.changes, "changes", tensors),
        "signature": _signature_record(content.signature, tensors),
        "choices": {name: dataclasses.asdict(choice) for name, choice in content.choices.items()},
        "left": content.left,
        "notes": content.notes,
        "example": [list(shape) for shape in content.example],
        "processor": content.processor,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # A network without zeros is stored dense, and that is right.
        pack(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            metadata={**metadata, "sparse": record},
            plain_zeros=True,
        )


def read(path: str | os.PathLike[str]) -> Content:
    """Read a file of `write`.

    Raises:
        ValueError: the file is damaged, holds no compiled network, or one of another version.
        OSError: the file cannot be read.
    """
    try:
        record = inspect(path).metadata.get("sparse")
        tensors = unpack(path)
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(f"{path} is no packed file: {_one_line(error)}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} holds no compiled network: compile_sparse(...).save(path) writes one")
    if record.get("version") not in READABLE:
        raise ValueError(
            f"{path} has version {record.get('version')} of compiled networks, this is for version {VERSION}"
        )
    try:
        content = _content(record, tensors)
        _dry_run(content)
    except Exception as error:  # Whatever a record or an operation on it raises, the cause is the file.
        raise ValueError(f"{path} describes no network: {_one_line(error)}") from error
    return content


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, Refused | TooLarge) else f"{type(error).__name__}: {text}"


def _content(record: dict[str, Any], tensors: dict[str, Tensor]) -> Content:
    graph = Graph([], decode(record["outputs"], tensors), decode(record["changes"], tensors))
    known: set[str] = set()
    for entry in record["nodes"]:
        node = node_of(entry, tensors, known)
        graph.nodes.append(node)
        known.add(node.name)
    signature = _signature(record["signature"], tensors)
    scalars = (Ref, int, float, bool, str, type(None))
    require(
        isinstance(graph.outputs, list) and all(isinstance(o, scalars) for o in graph.outputs), "an output is no value"
    )
    require(len(graph.outputs) == signature.returns.num_leaves, "the number of outputs is not that of its signature")
    changed = {node.name for node in graph.nodes if isinstance(node, Input | State)}
    changes = isinstance(graph.changes, dict) and graph.changes.keys() <= changed
    require(
        changes and all(isinstance(value, Ref) for value in graph.changes.values()),
        "it changes a value that is no input or state",
    )
    missing = [name for name in graph.kept() if name not in known]
    require(not missing, f"{missing[:1]} is not among its nodes")
    choices = {name: choice_of(entry) for name, entry in record["choices"].items()}
    layers = [node.name for node in graph.layers()]
    require(choices.keys() == set(layers), f"it names no execution for {set(layers) ^ choices.keys()}")
    example = [tuple(shape) for shape in record["example"]]
    require(
        all(type(n) is int and 0 <= n < 2**31 for shape in example for n in shape),
        "a shape of the example has a wrong size",
    )
    for shape in example:
        check_memory(f"an example of {list(shape)}", 4 * math.prod(shape), 0)
    left, notes = record["left"], record["notes"]
    texts = [*left, *left.values(), *notes, record["processor"]]
    require(
        isinstance(left, dict) and isinstance(notes, list) and all(isinstance(t, str) for t in texts),
        "a note is no text",
    )
    return Content(graph, signature, choices, left, notes, example, record["processor"])


def _dry_run(content: Content) -> None:
    """Run the network on tensors without values, which raises where parts do not fit together."""
    leaves = [leaf for leaf in content.signature.leaves if leaf.dtype is not None]
    inputs = content.graph.inputs()
    require(len(leaves) == len(inputs) == len(content.example), "it has other inputs than its signature")
    values = [leaf.value for leaf in content.signature.leaves if leaf.dtype is None]
    require(
        all(isinstance(value, int | float | str | bool | None) for value in values),
        "a constant argument has a wrong type",
    )
    dtypes = [leaf.dtype for leaf in leaves if leaf.dtype is not None]
    given, outputs, changes = dry_run(content.graph, content.example, dtypes)
    kept = {node.name: node.value for node in content.graph.nodes if isinstance(node, State)}
    kept |= {node.name: value for node, value in zip(inputs, given, strict=True)}
    for name, value in changes.items():
        same = isinstance(value, Tensor) and (value.shape, value.dtype) == (kept[name].shape, kept[name].dtype)
        require(same, f"{name} changes its shape")
    refs = [output for output, ref in zip(outputs, content.graph.outputs, strict=True) if isinstance(ref, Ref)]
    require(
        all(isinstance(output, Tensor | int | float | bool | torch.SymInt) for output in refs),
        "an output is no tensor or number",
    )
    given_values = iter(given)
    content.signature.check(
        [next(given_values) if leaf.dtype is not None else leaf.value for leaf in content.signature.leaves]
    )


def _signature_record(signature: Signature, tensors: dict[str, Tensor]) -> dict[str, Any]:
    leaves = [
        {
            "dtype": encode(leaf.dtype, "dtype", tensors),
            "sizes": None if leaf.sizes is None else list(leaf.sizes),
            "value": leaf.value,
        }
        for leaf in signature.leaves
    ]
    encode([leaf.value for leaf in signature.leaves], "an argument", tensors)
    return {
        "structure": _structure_record(signature.structure),
        "returns": _structure_record(signature.returns),
        "leaves": leaves,
        "guards": signature.guards,
        "names": signature.names,
        "contiguous": signature.contiguous,
        "detached": signature.detached,
    }


def _signature(record: dict[str, Any], tensors: dict[str, Tensor]) -> Signature:
    leaves = []
    for entry in record["leaves"]:
        sizes = entry["sizes"]
        known = sizes is None or all(type(size) is int or isinstance(size, str) for size in sizes)
        dtype = decode(entry["dtype"], tensors)
        require(known and (dtype is None or isinstance(dtype, torch.dtype)), "an argument has a wrong dtype or size")
        leaves.append(Leaf(dtype, None if sizes is None else tuple(sizes), entry["value"]))
    guards, names = record["guards"], record["names"]
    limits = [record.get(name, False) for name in ("contiguous", "detached")]
    require(all(isinstance(limit, bool) for limit in limits), "its signature is wrong about strides or gradients")
    require(all(isinstance(text, str) for text in (*guards, *names)), "a guard or a name is no text")
    structure, returns = _structure(record["structure"]), _structure(record["returns"])
    require(
        structure.num_leaves == len(leaves) and structure.type is tuple, "it has other arguments than its signature"
    )
    pair = structure.children()
    require(len(pair) == 2 and pair[0].type is tuple and pair[1].type is dict, "its arguments are no (args, kwargs)")
    return Signature(structure, leaves, list(guards), returns, list(names), *limits)


def _structure_record(structure: pytree.TreeSpec) -> Any:
    tree = pytree.tree_unflatten([0] * structure.num_leaves, structure)
    return encode(_plain(tree), "the structure of its arguments or results", {})


def _plain(tree: Any) -> Any:
    """Return a tree of tuples, lists and dicts; raise ValueError for other containers."""
    match tree:
        case _ if type(tree) in (list, tuple):
            return type(tree)(map(_plain, tree))
        case _ if type(tree) is dict:
            return {key: _plain(value) for key, value in tree.items()}
        case 0 | None:
            return tree
    raise ValueError(
        f"it takes or returns a {type(tree).__name__}, which a file cannot hold: torch.save keeps the network instead"
    )


def _structure(record: Any) -> pytree.TreeSpec:
    return pytree.tree_flatten(_plain(decode(record, {})))[1]
