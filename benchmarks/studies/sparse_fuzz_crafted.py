"""Files that somebody writes who knows the format, for benchmarks/studies/sparse_fuzz_files.py."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]
HUGE = 2**62


def _call(target: str, *args: Any, **kwargs: Any) -> Callable[[Record], None]:
    """Return a change that puts a call before the first pool, and its value in the place of the pool's input."""

    def change(record: Record) -> None:
        at = next(i for i, node in enumerate(record["nodes"]) if node["kind"] == "MaxPool")
        (old,) = record["nodes"][at]["inputs"]
        given = json.loads(json.dumps(args, default=lambda _: {"ref": old}))  # X is what JSON has no form for
        record["nodes"].insert(
            at,
            {
                "kind": "Call", "name": "crafted", "inputs": [old], "variable": False, "target": target,
                "args": {"tuple": given}, "kwargs": {"dict": kwargs}, "label": "",
            },
        )  # fmt: skip
        record["nodes"][at + 1]["inputs"] = ["crafted"]

    return change


X = object()  # the value that a crafted call reads


def _find(record: Record, kind: str, number: int = 0) -> Record:
    """Return the record of a node by its number among those of its kind."""
    return [node for node in record["nodes"] if node["kind"] == kind][number]


def _node(kind: str, number: int = 0, **fields: Any) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        _find(record, kind, number).update(fields)

    return change


def _pair(a: Any, b: Any) -> dict[str, Any]:
    return {"tuple": [a, b]}


def _field(*path: Any) -> Callable[[Record], None]:
    """Return a change that sets the value at the end of a way to its last part."""

    def change(record: Record) -> None:
        *way, last, value = path
        for key in way:
            record = record[key]
        record[last] = value

    return change


def _cut(**fields: Any) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for choice in record["choices"].values():
            choice.update(fields)

    return change


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"tuple": [value]}
    return value


RECORDS: dict[str, Callable[[Record], None]] = {
    # what C reads
    "stride 0": _node("Convolution", stride=_pair(0, 1)),
    "stride negative": _node("Convolution", stride=_pair(-1, -1)),
    "stride huge": _node("Convolution", stride=_pair(HUGE, HUGE)),
    "padding negative": _node("Convolution", padding=_pair(-1, 0)),
    "padding large": _node("Convolution", padding=_pair(2**19, 2**19)),
    "dilation large": _node("Convolution", dilation=_pair(2**20, 2**20)),
    "dilation 0": _node("Convolution", dilation=_pair(0, 0)),
    "groups of another number": _node("Convolution", groups=2),
    "groups of none": _node("Convolution", groups=0),
    "groups true": _node("Convolution", groups=True),
    "limits swapped": _node("Convolution", clamp=_pair(1.0, -1.0)),
    "limits NaN": _node("Convolution", clamp=_pair({"float": "nan"}, 1.0)),
    "limits beyond float32": _node("Convolution", clamp=_pair(-1e308, 1e308)),
    "limits are integers": _node("Convolution", clamp=_pair(-(10**400), 10**400)),
    "residual of the image": _node("Convolution", 1, inputs=["conv2d", "x"]),
    "residual of the state": _node("Convolution", 1, inputs=["conv2d", "b_calls"]),
    "three inputs": _node("Convolution", 1, inputs=["conv2d", "conv2d", "conv2d"]),
    "no inputs": _node("Convolution", 1, inputs=[]),
    "reads itself": _node("Convolution", 1, inputs=["conv2d_1"]),
    "reads what comes later": _node("Convolution", inputs=["linear"]),
    "the name of another": _node("Convolution", 1, name="conv2d"),
    "the name of the image": _node("Convolution", name="x"),
    "pool as large as the image": _node("MaxPool", kernel=_pair(2**20, 1)),
    "pool with padding beyond": _node("MaxPool", padding=_pair(2, 2)),
    "pool with stride 2**20": _node("MaxPool", stride=_pair(2**20, 2**20)),
    "mean of a mean": _node("Mean", 1, inputs=["mean"]),
    "linear on an image": _node("Linear", inputs=["mul_32"]),
    "the image varies": _node("Input", variable=True),
    "all values vary": lambda record: [node.update(variable=True) for node in record["nodes"]],
    "no strips": _cut(width=0),
    "strips of 2**20": _cut(width=2**20),
    "tiles of 2**20": _cut(tiles=2**20),
    "blocks of 2**20": _cut(blocks=2**20),
    "blocks negative": _cut(blocks=-4),
    "an execution of its own": _cut(execution="os.system"),
    "csr for all": _cut(execution="csr"),
    "channels_last for all": _cut(execution="channels_last"),
    # what Python and torch run
    "a call of the system": _call("os.system", "true"),
    "a call in place": _call("ops.aten.mul_.Tensor", X, 2),
    "a call with out": _call("ops.aten.abs.out", X, out={"ref": "x"}),
    "strides of its own": _call("ops.aten.as_strided.default", X, [2, 2], [HUGE, 1], HUGE),
    "storage of its own": _call("ops.aten.set_.source_Storage", X, "x"),
    "memory that nobody wrote": _call("ops.aten.empty.memory_format", [8, 8]),
    "a file": _call("ops.aten.from_file.default", "/etc/passwd", False, 10),
    "an attribute of torch": _call("ops.aten.relu.__class__", X),
    "a way through modules": _call("ops.__class__.__base__.default", X),
    "more memory than there is": _call("ops.aten.full.default", [2**20, 2**20, 2**10], 1.0),
    "numbers without end": _call("ops.aten.arange.default", 2**50),
    "a copy without end": _call("ops.aten.repeat.default", X, [2**30, 1, 1, 2**20]),
    "an index beyond": _call("ops.aten.index_select.default", X, 1, {"tensor": "conv2d|bias"}),
    "a gather of floats": _call("ops.aten.gather.default", X, 1, {"ref": "x"}),
    "a power without end": _call("operator.pow", 10, 10**9),
    "a list repeated": _call("operator.mul", [0], 2**40),
    "a string repeated": _call("operator.mul", "x", 2**40),
    "a shift without end": _call("operator.lshift", 1, 2**40),
    "an item of a string": _call("operator.getitem", "abc", 1),
    "a dtype beyond the last": _call("ops.aten._to_copy.default", X, dtype=-1),
    "a format beyond the last": _call("ops.aten.clone.default", X, memory_format=HUGE),
    "a norm of unlike shapes": _call("ops.aten._weight_norm.default", X, {"tensor": "conv2d|bias"}, 0),
    "a remainder of nothing": _call("ops.aten.remainder.int", 1, 0),
    "a list in a list": _call("ops.aten.mul.left_t", [0], 2**40),
    "attention without heads": _call("ops.aten.scaled_dot_product_attention.default", X, X, X, enable_gqa=True),
    "an LSTM with one state": _call("ops.aten.lstm.input", X, [X], [], False, 1, 0.0, False, False, False),
    "no overload": _call("ops.aten.relu", X),
    "a private overload": _call("ops.aten.relu._schema", X),
    # the rest of the record
    "a guard without end": _field("signature", "guards", ["9**9**9**9 > s77"]),
    "a guard that calls": _field("signature", "guards", ["__import__('os').system('true') == 0"]),
    "a guard as deep as a well": _field("signature", "guards", ["-" * 50000 + "s77 == 1"]),
    "a guard of large numbers": _field("signature", "guards", ["*".join(["4611686018427387904"] * 5000) + " > s77"]),
    "a guard that divides by zero": _field("signature", "guards", ["s77 // 0 == 1"]),
    "arguments as deep as a well": _field("signature", "structure", _deep(40)),
    "results as deep as a well": _field("signature", "returns", _deep(40)),
    "more results than outputs": _field("signature", "returns", _pair(0, 0)),
    "sizes of another rank": _field("signature", "leaves", 0, "sizes", ["s77", 3]),
    "negative sizes": _field("signature", "leaves", 0, "sizes", [-1, 3, -1, -1]),
    "integers as an image": _field("signature", "leaves", 0, "dtype", {"dtype": "int64"}),
    "an example beyond memory": _field("example", [[2**31 - 1] * 4]),
    "an example without a size": _field("example", [[]]),
    "no example": _field("example", []),
    "the state changes its shape": _field("changes", {"dict": {"b_calls": {"ref": "x"}}}),
    "the state is a layer": _field("changes", {"dict": {"conv2d": {"ref": "x"}}}),
    "the image is changed": _field("changes", {"dict": {"x": {"ref": "linear"}}}),
    "no choices": _field("choices", {}),
    "a choice of none": lambda record: record["choices"].update(nobody={"execution": "dense"}),
    "many nodes": lambda record: record["nodes"].extend(record["nodes"][2] | {"name": f"n{i}"} for i in range(2000)),
    "a name with lines": _node("Convolution", name="a\nb"),
    "nodes are none": _field("nodes", None),
    "an infinite time": _cut(ms={"float": "inf"}),
}  # fmt: skip

TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a weight of float64": ("conv2d|weight", Tensor.double),
    "a weight of integers": ("conv2d|weight", lambda t: t.to(torch.int32)),
    "a weight for other channels": ("conv2d|weight", lambda t: t[:, :1]),
    "a weight without elements": ("conv2d|weight", lambda t: t[:0]),
    "a weight of three dimensions": ("conv2d|weight", lambda t: t[0]),
    "a kernel without rows": ("conv2d|weight", lambda t: t[:, :, :0]),
    "a bias that is too short": ("conv2d_1|bias", lambda t: t[:1]),
    "a weight of NaN": ("conv2d_1|weight", lambda t: t * float("nan")),
    "a state of another shape": ("b_calls|value", lambda t: t.expand(2, 2)),
}


def crafted(record: Record, tensors: dict[str, Tensor], example: tuple) -> Iterator[tuple]:
    """Yield a name, a record, tensors and arguments for each crafted file."""
    for name, change in RECORDS.items():
        changed = copy.deepcopy(record)
        change(changed)
        yield name, changed, tensors, example
    for name, (key, change_tensor) in TENSORS.items():
        yield name, record, {**tensors, key: change_tensor(tensors[key]).contiguous()}, example
