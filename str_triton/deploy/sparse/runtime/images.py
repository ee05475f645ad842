"""The operations of torch that only copy or scale images, so that the kernels can execute them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Layer, Linear, Node
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool
from str_triton.deploy.sparse.graph.refs import Ref

aten = torch.ops.aten
Shapes = Mapping[str, tuple[int, ...]]


class Gate(NamedTuple):
    """The product of an image and a number for each of its channels, [images, channels, 1, 1]."""

    image: str
    factors: str


class Parts(NamedTuple):
    """A concatenation of images along their channels."""

    images: tuple[str, ...]


class Channels(NamedTuple):
    """Some channels of an image, from `begin` on."""

    image: str
    begin: int


def image_operation(node: Node, shapes: Shapes) -> Gate | Parts | Channels | None:
    """Return what a call of torch does to images [images, channels, height, width]; None for any other call."""
    if not isinstance(node, Call) or node.variable or node.kwargs or any(name not in shapes for name in node.inputs):
        return None
    own = shapes.get(node.name, ())
    if len(own) != 4 or 0 in own:
        return None
    found = _READERS[node.target](node.args, own, shapes) if node.target in _READERS else None
    return found if found and all(len(shapes[name]) == 4 for name in node.inputs) else None


def _gate(args: tuple, own: tuple[int, ...], shapes: Shapes) -> Gate | None:
    match args:
        case (Ref(x), Ref(y)):
            for image, factors in ((x, y), (y, x)):
                if shapes[image] == own and shapes[factors] == (*own[:2], 1, 1):
                    return Gate(image, factors)
    return None


def _parts(args: tuple, own: tuple[int, ...], shapes: Shapes) -> Parts | None:
    match args:
        case (list() as parts, int() as dim) if dim in (1, -3) and all(type(part) is Ref for part in parts):
            return Parts(tuple(part.name for part in parts))
    return None


def _channels(args: tuple, own: tuple[int, ...], shapes: Shapes) -> Channels | None:
    match args:
        case (Ref(x), int() as dim, int() | None as begin, *_) if dim in (1, -3) and len(shapes[x]) == 4:
            first, end, step = slice(begin, *args[3:]).indices(shapes[x][1]) if _are_sizes(args[3:]) else (0, 0, 0)
            if step == 1 and end - first == own[1]:
                return Channels(x, first)
    return None


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return len(values) in (1, 2) and all(value is None or type(value) is int for value in values) and 0 not in values


_READERS: dict[Any, Any] = {aten.mul.Tensor: _gate, aten.cat.default: _parts, aten.slice.Tensor: _channels}


# They give the elements another shape, and keep their order.
_RESHAPES = (
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view.default,
)


def reshaped(node: Node, shapes: Shapes) -> str | None:
    """Return the tensor that a call of torch gives another shape; None for any other call."""
    if not isinstance(node, Call) or node.variable or node.target not in _RESHAPES or type(node.args[0]) is not Ref:
        return None
    source = node.args[0].name
    return source if {source, node.name} <= shapes.keys() else None


PAD = aten.constant_pad_nd.default


def padded_image(node: Node, shapes: Shapes, wanted: float = 0) -> str | None:
    """Return the image around whose pixels a call puts a number, zero or the code of zero; None for any other call."""
    if not isinstance(node, Call) or node.variable or node.kwargs or node.target not in (PAD, aten.pad.default):
        return None
    match node.args:
        case (Ref(name), list() as numbers, *rest):
            if node.target is not PAD and rest:
                mode, *rest = rest
                numbers = numbers if mode == "constant" else []
            value = rest[0] if rest and rest[0] is not None else 0
            is_image = len(shapes.get(name, ())) == len(shapes.get(node.name, ())) == 4 and len(numbers) in (2, 4)
            return name if is_image and value == wanted else None
    return None


def leader(node: Node, shapes: Shapes) -> str | None:
    """Return the input whose form (image or tensor) this node's value takes; None if it follows no input."""
    if isinstance(node, MaxPool | AvgPool):
        return node.inputs[0]
    if (padded := padded_image(node, shapes)) is not None:
        return padded
    match image_operation(node, shapes):
        case Gate(image, _) | Channels(image, _):
            return image
        case Parts((first, *_)):
            return first
    return None


MOST_PHASES = 1024  # the limit for the phases of a strided window's input: each phase is a plane of its own


def has_window(node: Node, shapes: Shapes) -> bool:
    """Check that a pool is a window over the pixels of its image that a kernel can slide."""
    if isinstance(node, AvgPool):
        known = {node.name, node.inputs[0]} <= shapes.keys()
        fits = known and 0 not in shapes[node.name] and node.is_uniform(shapes[node.inputs[0]], shapes[node.name])
        return fits and math.prod(node.stride) <= 16
    return isinstance(node, MaxPool) and math.prod(node.stride) <= MOST_PHASES


def is_row(node: Layer, shapes: Shapes) -> bool:
    """Check whether a layer multiplies single rows: vectors of features, or images of one pixel."""
    if isinstance(node, Linear):
        return math.prod(shapes[node.name][:-1]) == 1
    if not isinstance(node, Convolution) or isinstance(node, Pointwise) or not node.is_pointwise:
        return False
    return node.groups == 1 == len(node.inputs) and shapes.get(node.name, ())[2:] == (1, 1)
