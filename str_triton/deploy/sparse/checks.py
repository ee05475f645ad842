"""The checks of a node's fields, which a file may have given: shapes, dtypes and every number that reaches C."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph import nodes, pools, quantized
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.quantized_recurrent import QuantizedRecurrent
from str_triton.deploy.sparse.graph.recurrent import Recurrent

MOST = 2**20  # the limit for a stride, a padding, a number of blocks: larger than any in use, too small to overflow
LARGEST = torch.finfo(torch.float32).max


class Refused(ValueError):
    """The error for a record that describes no network; the message says what is wrong with it."""


def require(condition: bool, message: str) -> None:
    """Raise Refused with the message unless the condition holds."""
    if not condition:
        raise Refused(message)


def is_size(value: Any, least: int) -> bool:
    """Check that a value is an integer from `least` to MOST."""
    return type(value) is int and least <= value <= MOST


def _is_pair(value: Any, least: int) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(is_size(number, least) for number in value)


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
    sizes = pairs and _is_layer(node, 4, 2) and is_size(node.groups, 1) and min(node.weight.shape) > 0
    require(sizes and node.weight.shape[0] % node.groups == 0, f"{node.name} is no convolution")


def _check_pointwise(node: Pointwise) -> None:
    _check_convolution(node)
    plain = node.is_pointwise and node.dilation == (1, 1) and node.groups == len(node.weight)
    plain = plain and node.weight.shape[1] == 1 and isinstance(node.scales, bool)
    identity = plain and (node.scales or bool((node.weight == 1).all() and (node.bias == 0).all()))
    require(identity, f"{node.name} is no product by channels")


def _check_linear(node: nodes.Linear) -> None:
    require(_is_layer(node, 2, 1), f"{node.name} is no linear layer")


def _check_pool(node: pools.MaxPool | pools.AvgPool) -> None:
    pairs = all(_is_pair(pair, 1) for pair in (node.kernel, node.stride, node.dilation)) and _is_pair(node.padding, 0)
    small = pairs and all(2 * p <= k for p, k in zip(node.padding, node.kernel, strict=True))
    flags = isinstance(node.ceil, bool) and isinstance(getattr(node, "whole", True), bool)
    usual = small and flags and math.prod(node.kernel) <= MOST and len(node.inputs) == 1
    require(usual, f"{node.name} is no pool")


def _check_mean(node: pools.Mean) -> None:
    require(isinstance(node.keep, bool) and len(node.inputs) == 1, f"{node.name} is no mean")


def _is_grid(grid: quantized.Grid) -> bool:
    usual = type(grid.scale) is float and quantized.SMALLEST <= grid.scale <= LARGEST
    # The kernels would round a number that float32 cannot hold.
    exact = usual and float(torch.tensor(grid.scale, dtype=torch.float32)) == grid.scale
    return exact and type(grid.zero) is int and 0 <= grid.zero <= quantized.TOP


def _check_coder(node: quantized.Quantize | quantized.Dequantize) -> None:
    require(_is_grid(node.grid) and len(node.inputs) == 1, f"{node.name} has no grid")


def _check_quantized_mean(node: quantized.QuantizedMean) -> None:
    _check_mean(node)
    require(_is_grid(node.grid), f"{node.name} has no grid")


def _check_quantized_convolution(node: quantized.QuantizedConvolution) -> None:
    _check_convolution(node)
    before, table = node.before, node.table
    fits = before is None if table is None else before is not None and _is_grid(before)
    fits = fits and (table is None or (_is_tensor(table, 1, torch.uint8) and len(table) == quantized.TOP + 1))
    require(fits, f"{node.name} has no table of 256 codes")
    _check_products(node, 1 + len(node.inputs))
    require(node.residual_factor() <= quantized.MOST_FACTOR, f"{node.name} has scales beyond reason")


def _check_gate(node: quantized.QuantizedGate) -> None:
    fits = len(node.inputs) == len(node.grids) == 2 and all(map(_is_grid, node.grids))
    require(fits and node.ratio() <= quantized.MOST_FACTOR, f"{node.name} has no grids")


def _check_quantized_linear(node: quantized.QuantizedLinear) -> None:
    _check_linear(node)
    _check_products(node, 1)


def _check_products(node: quantized.QuantizedConvolution | quantized.QuantizedLinear, grids: int) -> None:
    """Check the numbers of a quantized layer: sums must fit into int32, products into float32."""
    fits = _is_tensor(node.scale, 1, torch.float32) and node.scale.shape == node.bias.shape
    fits = fits and (node.activation == "" or getattr(node, "table", None) is not None)
    require(fits and len(node.grids) == grids and all(map(_is_grid, node.grids)), f"{node.name} has no grids")
    sums = node.weight.numel() > 0 and int(node.weight.min()) >= -127 and node.span() < 2**31
    require(sums, f"{node.name} has sums beyond 32 bits")
    usual = bool(((node.scale >= quantized.SMALLEST) & (node.scale <= LARGEST)).all())
    require(usual and float(node.factors().max()) <= quantized.MOST_FACTOR, f"{node.name} has scales beyond reason")


def _check_held(node: nodes.State | nodes.Constant) -> None:
    require(isinstance(node.value, Tensor) and not node.inputs, f"{node.name} holds no tensor")


def _check_input(node: nodes.Input) -> None:
    require(not node.inputs, f"{node.name} is no input")


def _check_call(node: nodes.Call) -> None:
    pass


_CHECKS: tuple[tuple[type[nodes.Node], Callable[[Any], None]], ...] = (
    (nodes.Input, _check_input),
    (nodes.State, _check_held),
    (nodes.Constant, _check_held),
    (nodes.Call, _check_call),
    (nodes.Convolution, _check_convolution),
    (nodes.Linear, _check_linear),
    (Recurrent, Recurrent.check_fields),
    (QuantizedRecurrent, Recurrent.check_fields),
    (Pointwise, _check_pointwise),
    (pools.MaxPool, _check_pool),
    (pools.AvgPool, _check_pool),
    (pools.Mean, _check_mean),
    (quantized.Quantize, _check_coder),
    (quantized.Dequantize, _check_coder),
    (quantized.QuantizedMean, _check_quantized_mean),
    (quantized.QuantizedGate, _check_gate),
    (quantized.QuantizedConvolution, _check_quantized_convolution),
    (quantized.QuantizedLinear, _check_quantized_linear),
)
KINDS = {kind.__name__: (kind, check) for kind, check in _CHECKS}
