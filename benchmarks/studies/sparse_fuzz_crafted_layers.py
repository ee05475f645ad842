"""Crafted files with recurrent layers and layers on 8-bit integers, for benchmarks/studies/sparse_fuzz_files.py."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.sparse_fuzz_crafted import HUGE, Record, _cut, _field, _find, _node, _pair

NAN, INFINITE = {"float": "nan"}, {"float": "inf"}
GRU, LSTM, BACK, FAST, MINIMAL = range(5)  # the numbers of the recurrent layers in the network `Steps`
SQUARE = torch.ones(20, 20)  # of the LSTM's gates and of the features that it reads
Change = Callable[[Record, dict[str, Tensor]], None]


def _all(change: Callable[[Record], None]) -> Change:
    return lambda record, tensors: change(record)


def _of(kind: str, number: int = 0, **fields: Any) -> Change:
    return _all(_node(kind, number, **fields))


def _layer(number: int, **fields: Any) -> Change:
    return _of("Recurrent", number, **fields)


def _tensor(kind: str, number: int, field: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Return a change of one tensor of a node."""

    def made(record: Record, tensors: dict[str, Tensor]) -> None:
        node = _find(record, kind, number)
        key = node[field]["tensor"]
        tensors[key] = change(tensors[key]).contiguous()

    return made


def _reads(kind: str, number: int, *names: Any) -> Change:
    """Return a change of a node's inputs; a number stands for the input of this number that the node has now."""

    def made(record: Record, tensors: dict[str, Tensor]) -> None:
        node = _find(record, kind, number)
        node["inputs"] = [node["inputs"][name] if isinstance(name, int) else name for name in names]

    return made


def _projected(weight: Tensor | None, bias: Tensor | None) -> Change:
    """Return a change that gives the LSTM a projection of its input."""

    def made(record: Record, tensors: dict[str, Tensor]) -> None:
        given = {"weight_in": weight, "bias_in": bias}
        tensors.update({name: value.contiguous() for name, value in given.items() if value is not None})
        fields = {name: None if value is None else {"tensor": name} for name, value in given.items()}
        _node("Recurrent", LSTM, **fields)(record)

    return made


RECURRENT: dict[str, Change] = {
    "a cell of more gates": _layer(GRU, cell="lstm"),
    "a cell of fewer gates": _layer(GRU, cell="mgu"),
    "a cell of none": _layer(GRU, cell="transformer"),
    "a cell that is a number": _layer(GRU, cell=0),
    "a cell that is a list": _layer(GRU, cell=["gru"]),
    "a factor alone": _layer(GRU, v=None),
    "a second factor": _layer(LSTM, v={"tensor": "second"}),
    "a factor that is a number": _layer(GRU, v=1.0),
    "no scalars": _layer(FAST, scale=None),
    "scalars of a GRU": _layer(GRU, scale={"tensor": "second"}),
    **{
        f"a projection {what}": _projected(weight, bias)
        for what, weight, bias in (
            ("that fits", SQUARE, SQUARE[0]), ("without a bias", SQUARE, None),
            ("that is a bias alone", None, SQUARE[0]),
            ("of no features", SQUARE[:, :0], SQUARE[0]), ("of fewer gates", SQUARE[:15], SQUARE[0]),
            ("of other features", SQUARE[:, :5], SQUARE[0]), ("with a short bias", SQUARE, SQUARE[0, :5]),
            ("in float64", SQUARE.double(), SQUARE[0]), ("of NaN", SQUARE * float("nan"), SQUARE[0]),
            ("that is a vector", SQUARE[0], SQUARE[0]),
        )
    },
    "reverse is a number": _layer(LSTM, reverse=1),
    "reverse is a text": _layer(LSTM, reverse="yes"),
    "a recurrent layer with limits": _layer(GRU, clamp=_pair(0.0, 1.0)),
    "a recurrent layer with NaN limits": _layer(GRU, clamp=_pair(NAN, NAN)),
    "a recurrent layer with an activation": _layer(MINIMAL, activation="silu"),
    "a slope without end": _layer(GRU, slope=1e308),
    "no state": _reads("Recurrent", GRU, 0),
    "a state too many": _reads("Recurrent", GRU, 0, 1, 1),
    "the state is the sequence": _reads("Recurrent", GRU, 0, 0),
    "the sequence is the state": _reads("Recurrent", GRU, 1, 1),
    "h without c": _reads("Recurrent", LSTM, 0, 1),
    "the state of another layer": _reads("Recurrent", LSTM, 0, 1, "h"),
    "a sequence of another layer": _reads("Recurrent", BACK, "x", 1, 2),
    "a layer reads itself": lambda record, tensors: _reads(
        "Recurrent", LSTM, _find(record, "Recurrent", LSTM)["name"], 1, 2
    )(record, tensors),
    "no execution of loops": _all(_cut(execution="csr")),
    "the kernels for loops": _all(_cut(execution="sparse")),
    "integers for loops": _all(_cut(execution="int8")),
    "channels_last for loops": _all(_cut(execution="channels_last")),
    "shares of 2**20": _all(_cut(tiles=2**20, blocks=2**20, width=2**20)),
    "sequences without steps": _all(_field("example", 0, [2, 0, 6])),
    "no sequences": _all(_field("example", [[0, 5, 6], [1, 0, 8]])),
    "steps beyond memory": _all(_field("example", 0, [2, 2**31 - 1, 6])),
    "steps of a gigabyte": _all(_field("example", 0, [2, 2**24, 6])),
    "states of another batch": _all(_field("example", 1, [1, 3, 8])),
    "states of another size": _all(_field("example", 1, [1, 2, 9])),
    "states of another rank": _all(_field("example", 1, [2, 8])),
    "states are integers": _all(_field("signature", "leaves", 1, "dtype", {"dtype": "int64"})),
    "sequences in float64": _all(_field("signature", "leaves", 0, "dtype", {"dtype": "float64"})),
    "the outputs' slice goes on": _all(_field("nodes", -1, "args", {"tuple": [{"ref": "x"}, 0, -HUGE, HUGE]})),
    **{
        f"{what} ({('gru', 'lstm', 'back', 'fastgrnn', 'mgu')[number]})": _tensor("Recurrent", number, field, change)
        for what, number, field, change in (
            ("no units", GRU, "weight", lambda t: t[:0]),
            ("no rank", GRU, "weight", lambda t: t[:, :0]),
            ("a vector for a matrix", GRU, "weight", lambda t: t[0]),
            ("rows that are no gates", GRU, "weight", lambda t: t[:-1]),
            ("a gate too few", LSTM, "weight", lambda t: t[: len(t) // 4 * 3]),
            ("float64", GRU, "weight", Tensor.double),
            ("bytes", GRU, "weight", lambda t: t.to(torch.int8)),
            ("float16", MINIMAL, "weight", Tensor.half),
            ("NaN", GRU, "weight", lambda t: t * float("nan")),
            ("infinite", LSTM, "weight", lambda t: t + float("inf")),
            ("1e38", FAST, "weight", lambda t: t * 0 + 1e38),
            ("the factor transposed", GRU, "v", lambda t: t.t()),
            ("a factor of other units", GRU, "v", lambda t: torch.cat([t, t])),
            ("a factor of another rank", FAST, "v", lambda t: t[:, :-1]),
            ("a factor of no units", MINIMAL, "v", lambda t: t[:0]),
            ("a factor of three dimensions", MINIMAL, "v", lambda t: t[None]),
            ("a short bias", GRU, "bias", lambda t: t[:-1]),
            ("an empty bias", LSTM, "bias", lambda t: t[:0]),
            ("a bias of half", FAST, "bias", lambda t: t[: len(t) // 2]),
            ("a bias of NaN", BACK, "bias", lambda t: t * float("nan")),
            ("three scalars", FAST, "scale", lambda t: torch.cat([t, t[:1]])),
            ("one scalar", FAST, "scale", lambda t: t[:1]),
            ("scalars of NaN", FAST, "scale", lambda t: t * float("nan")),
            ("scalars of 1e38", FAST, "scale", lambda t: t * 0 + 1e38),
        )
    },
}  # fmt: skip

INTEGERS: dict[str, Change] = {
    **{
        f"a grid of {scale} and {zero}": _of(kind, grid=_pair(scale, zero))
        for kind, scale, zero in (
            ("Quantize", 0.0, 5), ("Quantize", -1.0, 5), ("Quantize", NAN, 5), ("Quantize", INFINITE, 5),
            ("Quantize", 1e-45, 5), ("Quantize", 1e300, 5), ("Quantize", 0.1, 5), ("Quantize", 1, 5),
            ("Quantize", True, 5), ("Quantize", None, 5), ("Quantize", "1.0", 5), ("Quantize", 2.0**-126, 0),
            ("Quantize", 2.0**127, 255), ("Quantize", 0.5, -1), ("Quantize", 0.5, 256), ("Quantize", 0.5, 2**31),
            ("Quantize", 0.5, -HUGE), ("Quantize", 0.5, 1.5), ("Quantize", 0.5, True), ("Quantize", 0.5, None),
            ("QuantizedMean", NAN, 5), ("QuantizedMean", 0.5, 300), ("QuantizedMean", 2.0**-126, 0),
            ("QuantizedMean", 2.0**127, 0),
        )
    },
    "a grid of three": _of("Quantize", grid={"tuple": [0.5, 1, 2]}),
    "a grid that is none": _of("Quantize", grid=None),
    "no grids": _of("QuantizedConvolution", grids={"tuple": []}),
    "one grid": _of("QuantizedConvolution", grids={"tuple": [_pair(0.5, 1)]}),
    "four grids": _of("QuantizedConvolution", grids={"tuple": [_pair(0.5, 1)] * 4}),
    "a residual's grid alone": _of("QuantizedConvolution", grids={"tuple": [_pair(0.5, 1)] * 3}),
    "grids of other scales": _of("QuantizedConvolution", grids={"tuple": [_pair(2.0**60, 0), _pair(2.0**-60, 255)]}),
    "grids of usual scales": _of("QuantizedConvolution", grids={"tuple": [_pair(2.0, 7), _pair(0.5, 250)]}),
    "two grids of a linear layer": _of("QuantizedLinear", grids={"tuple": [_pair(0.5, 1)] * 2}),
    "limits of NaN": _of("QuantizedConvolution", clamp=_pair(NAN, 1.0)),
    "limits that are swapped": _of("QuantizedConvolution", clamp=_pair(1.0, -1.0)),
    "limits of 1e38": _of("QuantizedConvolution", clamp=_pair(-1e38, 1e38)),
    "limits of a linear layer": _of("QuantizedLinear", clamp=_pair(NAN, NAN)),
    "an activation": _of("QuantizedConvolution", activation="gelu"),
    "an activation of a linear layer": _of("QuantizedLinear", activation="gelu"),
    "a residual without a grid": _reads("QuantizedConvolution", 0, 0, 0),
    "a layer reads floats": _reads("QuantizedConvolution", 0, "x"),
    "a linear layer reads floats": _reads("QuantizedLinear", 0, "x"),
    "a linear layer reads an image": lambda record, tensors: _reads(
        "QuantizedLinear", 0, _find(record, "QuantizedConvolution")["name"]
    )(record, tensors),
    "codes of codes": lambda record, tensors: _add_reader(record, "Quantize", grid=_pair(0.5, 3)),
    "floats of floats": lambda record, tensors: _find(record, "Quantize").update(kind="Dequantize"),
    "a float mean of codes": lambda record, tensors: _float_mean(record),
    "a mean of floats": _reads("QuantizedMean", 0, "x"),
    "a pool of codes with a border": _of("MaxPool", padding=_pair(1, 1)),
    "a pool of codes beyond the image": _of("MaxPool", kernel=_pair(2**10, 2**10), stride=_pair(1, 1)),
    "padding of 2**19": _of("QuantizedConvolution", padding=_pair(2**19, 2**19)),
    "padding and dilation": _of("QuantizedConvolution", padding=_pair(2**18, 2**18), dilation=_pair(2**18, 2**18)),
    "dilation of 2**20": _of("QuantizedConvolution", dilation=_pair(2**20, 2**20)),
    "stride of none": _of("QuantizedConvolution", stride=_pair(0, 0)),
    "stride of 2**20": _of("QuantizedConvolution", stride=_pair(2**20, 2**20)),
    "groups of none": _of("QuantizedConvolution", groups=0),
    "groups of eight": _of("QuantizedConvolution", groups=8),
    "codes vary": lambda record, tensors: [node.update(variable=True) for node in record["nodes"]],
    "csr for codes": _all(_cut(execution="csr")),
    "floats for codes": _all(_cut(execution="sparse")),
    "loops for codes": _all(_cut(execution="loop")),
    "codes cut in 2**20": _all(_cut(width=2**20, tiles=2**20, blocks=2**20)),
    "codes are the input": _all(_field("signature", "leaves", 0, "dtype", {"dtype": "uint8"})),
    "an image of no pixels": _all(_field("example", 0, [2, 3, 0, 0])),
    "images without end": _all(_field("example", 0, [2**10, 3, 2**10, 2**10])),
    **{
        f"{what} ({kind})": _tensor(kind, 0, field, change)
        for kind in ("QuantizedConvolution", "QuantizedLinear")
        for what, field, change in (
            ("a weight of -128", "weight", lambda t: torch.full_like(t, -128)),
            ("a weight of 127", "weight", lambda t: torch.full_like(t, 127)),
            ("a weight of int16", "weight", lambda t: t.to(torch.int16)),
            ("a weight of bytes", "weight", lambda t: t.to(torch.uint8)),
            ("a weight of floats", "weight", Tensor.float),
            ("a weight of none", "weight", lambda t: t[:0]),
            ("a weight of a vector", "weight", Tensor.flatten),
            ("a bias of int64", "bias", Tensor.long),
            ("a bias of floats", "bias", Tensor.float),
            ("a bias of 2**31 - 1", "bias", lambda t: torch.full_like(t, 2**31 - 1)),
            ("a bias of -2**31", "bias", lambda t: torch.full_like(t, -(2**31))),
            ("a bias of 2**30", "bias", lambda t: torch.full_like(t, 2**30)),
            ("a bias too short", "bias", lambda t: t[1:]),
            ("scales of zero", "scale", torch.zeros_like),
            ("scales below zero", "scale", lambda t: -t),
            ("scales of NaN", "scale", lambda t: t * float("nan")),
            ("scales without end", "scale", lambda t: t / 0.0),
            ("scales of 1e-44", "scale", lambda t: torch.full_like(t, 1e-44)),
            ("scales of 1e38", "scale", lambda t: torch.full_like(t, 1e38)),
            ("scales too few", "scale", lambda t: t[1:]),
            ("scales in float64", "scale", Tensor.double),
        )
    },
}  # fmt: skip


BYTE_STEPS: dict[str, Change] = {
    "a layer of floats": lambda record, tensors: _find(record, "QuantizedRecurrent").update(kind="Recurrent"),
    "no scales": _of("QuantizedRecurrent", steps=None),
    "bytes, and no factor": _of("QuantizedRecurrent", v=None),
    "bytes of another cell": _of("QuantizedRecurrent", cell="lstm"),
    **{f"{name} for bytes": _all(_cut(execution=name)) for name in ("csr", "sparse", "int8", "channels_last")},
    "shares of 2**20 for bytes": _all(_cut(tiles=2**20, blocks=2**20, width=2**20)),
    **{
        f"{what} ({field}, {number})": _tensor("QuantizedRecurrent", number, field, change)
        for number, field in ((GRU, "weight"), (GRU, "v"), (LSTM, "weight"), (FAST, "v"), (MINIMAL, "weight"))
        for what, change in (
            ("-128", lambda t: torch.full_like(t, -128)), ("127", lambda t: torch.full_like(t, 127)),
            ("-127", lambda t: torch.full_like(t, -127)), ("unsigned bytes", lambda t: t.to(torch.uint8)),
            ("int16", Tensor.short), ("floats", Tensor.float), ("no rows", lambda t: t[:0]),
            ("no columns", lambda t: t[:, :0]), ("a row too few", lambda t: t[1:]),
            ("a column too few", lambda t: t[:, 1:]), ("a vector", Tensor.flatten),
        )
    },
    **{
        f"scales {what} ({number})": _tensor("QuantizedRecurrent", number, "steps", change)
        for number in (GRU, LSTM, BACK)
        for what, change in (
            ("of zero", torch.zeros_like), ("below zero", lambda t: -t), ("of NaN", lambda t: t * float("nan")),
            ("without end", lambda t: t / 0.0), ("of 1e-44", lambda t: torch.full_like(t, 1e-44)),
            ("of 1e38", lambda t: torch.full_like(t, 1e38)), ("too few", lambda t: t[1:]),
            ("in float64", Tensor.double), ("that are a matrix", lambda t: t[None]),
        )
    },
}  # fmt: skip


def _add_reader(record: Record, kind: str, **fields: Any) -> None:
    """Add a node that reads the first layer on integers, and return its value."""
    name = _find(record, "QuantizedConvolution")["name"]
    record["nodes"].append({"kind": kind, "name": "crafted", "inputs": [name], "variable": False, **fields})
    record["outputs"][0] = {"ref": "crafted"}


def _float_mean(record: Record) -> None:
    node = _find(record, "QuantizedMean")
    node["kind"] = "Mean"
    del node["grid"]


def crafted(
    changes: dict[str, Change], record: Record, tensors: dict[str, Tensor], example: tuple
) -> Iterator[tuple[str, Record, dict[str, Tensor], tuple]]:
    """Yield a name, a record, tensors and arguments for each crafted file."""
    for name, change in changes.items():
        changed, kept = copy.deepcopy(record), {"second": torch.ones(5, 5), **tensors}
        change(changed, kept)
        yield name, changed, kept, example
