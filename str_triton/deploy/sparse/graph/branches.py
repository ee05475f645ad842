"""Parallel branches: convolutions and norms that read one value and are added up become one convolution."""

import math
from collections import Counter

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import FREE, Convolution, Graph, Node, Pair
from str_triton.deploy.sparse.graph.pointwise import Add, Norm


def merge_branches(graph: Graph, users: Counter[str]) -> dict[str, Node]:
    """Make one convolution of each sum of branches that read the same value, as in RepVGG and MobileOne.

    Returns the nodes for `fuse` to remove: by name, the convolution that each became part of.
    """
    nodes = {node.name: node for node in graph.nodes}
    merged: dict[str, Node] = {}
    for node in graph.nodes:
        if not isinstance(node, Add):
            continue
        names = node.inputs
        parts = [merged.get(name) or nodes[name] for name in names]
        if parts[0] is parts[1] or any(users[name] != 1 for name in names):
            continue
        first, second = parts
        if not isinstance(first, Convolution) or (isinstance(second, Convolution) and _taps(second) > _taps(first)):
            first, second = second, first
        if _is_bare(first) and first.inputs == second.inputs and _take_in(first, second):
            merged |= {node.name: first, second.name: first}
            merged |= {name: first for name, into in merged.items() if into is second}
    return merged


def _taps(node: Convolution) -> int:
    return math.prod(node.kernel)


def _is_bare(node: Node) -> bool:
    return isinstance(node, Convolution) and (len(node.inputs), node.clamp, node.activation) == (1, FREE, "")


def _take_in(wide: Convolution, other: Node) -> bool:
    """Add another branch to a convolution; False where it does not fit into its kernel."""
    if isinstance(other, Norm) and other.dims == 4:
        weight, bias = _diagonal(other.scale, wide.groups), other.shift
        kernel, padding, dilation = (1, 1), (0, 0), (1, 1)
        alike = wide.stride == (1, 1) and weight is not None
    elif isinstance(other, Convolution) and _is_bare(other):
        weight, bias = other.weight.double(), other.bias.double()
        kernel, padding, dilation = other.kernel, other.padding, other.dilation
        alike = wide.stride == other.stride and wide.groups == other.groups
    else:
        return False
    if not alike or weight.shape[:2] != wide.weight.shape[:2]:
        return False
    places = [
        _places(wide, axis, [d * k - p for k in range(n)])
        for axis, (n, p, d) in enumerate(zip(kernel, padding, dilation, strict=True))
    ]
    if None in places:
        return False
    rows, columns = (torch.tensor(found, device="cpu") for found in places)
    total = wide.weight.double()
    total[:, :, rows[:, None], columns] += weight
    wide.weight, wide.bias = total.float(), (wide.bias.double() + bias).float()
    return True


def _places(wide: Convolution, axis: int, offsets: list[int]) -> list[int] | None:
    """Return the elements of a kernel along an axis that read at these offsets; None if one is missing."""
    own: Pair = wide.padding[axis], wide.dilation[axis]
    have = {own[1] * k - own[0]: k for k in range(wide.kernel[axis])}
    return [have[offset] for offset in offsets] if have.keys() >= set(offsets) else None


def _diagonal(scale: Tensor, groups: int) -> Tensor | None:
    """Return a 1x1 kernel that multiplies each channel by its scale, [channels, channels / groups, 1, 1]."""
    channels = len(scale)
    if channels % groups:
        return None
    size = channels // groups
    return (
        torch.diag(scale)
        .view(groups, size, groups, size)
        .diagonal(dim1=0, dim2=2)
        .permute(2, 0, 1)
        .reshape(channels, size, 1, 1)
    )
