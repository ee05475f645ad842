"""Layers on 8-bit integers. Their `run` is the plain reference: the kernels in C give the same integers, bit for bit.

A real value v is stored as the code q = round(v / scale) + zero, one byte without a sign. Weights are int8 with a scale
for each output channel and without an offset, so zeros stay zeros. A layer sums products of integers exactly in int32,
and then computes in float32 with one rounding for each operation: a product with one number per channel, the residual,
the clamp. Rounding to integers is to the nearest, ties to even.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Linear, Node
from str_triton.deploy.sparse.graph.pools import MaxPool, Mean

TOP = 255  # the largest code
LARGEST = 127  # the largest absolute int8 weight: symmetric
SMALLEST = torch.finfo(torch.float32).tiny  # the smallest scale
MOST_FACTOR = 1e20  # the largest factor of a sum, so that no product is infinite
EXACT = 2**24  # integers up to here are exact in float32, in sums of any order as long as all partial sums are


class Grid(NamedTuple):
    """The mapping of real values to codes: code = round(value / scale) + zero, in 0 to 255."""

    scale: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> "Grid":
        """Return the grid that spans [low, high] and holds 0 exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(torch.tensor((high - low) / TOP or 1.0, dtype=torch.float32))
        scale = scale if math.isfinite(scale) and scale >= SMALLEST else 1.0
        return cls(scale, min(max(round(-low / scale), 0), TOP))

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of float32 values; NaN gets the code of 0."""
        steps = (x / self.scale).nan_to_num(0.0).clamp(-self.zero, TOP - self.zero)
        return (torch.round(steps) + self.zero).to(torch.uint8)

    def steps(self, codes: Tensor) -> Tensor:
        """Return how many steps from zero the codes stand for, float32."""
        return codes.float() - self.zero

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values that codes stand for."""
        return self.steps(codes) * self.scale

    def limits(self, clamp: tuple[float, float]) -> tuple[int, int]:
        """Return the lowest and the highest step of values within `clamp`."""
        low, high = (min(max(limit / self.scale, -self.zero), TOP - self.zero) for limit in clamp)
        return round(low), round(high)


@dataclass
class Quantize(Node):
    """The codes of a float32 value."""

    grid: Grid

    def __post_init__(self) -> None:
        self.grid = Grid(*self.grid)

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.grid.encode(values[self.inputs[0]])


@dataclass
class Dequantize(Node):
    """The float32 value of codes."""

    grid: Grid

    def __post_init__(self) -> None:
        self.grid = Grid(*self.grid)

    def run(self, values: dict[str, Any]) -> Tensor:
        return self.grid.decode(values[self.inputs[0]])


@dataclass
class QuantizedMean(Mean):
    """The mean over the last two dimensions of codes, as float32."""

    grid: Grid = field(kw_only=True)

    def __post_init__(self) -> None:
        self.grid = Grid(*self.grid)

    def factor(self, pixels: int) -> float:
        """Return what the sum of the steps is multiplied by."""
        return float(torch.tensor(self.grid.scale / max(pixels, 1), dtype=torch.float32))

    def run(self, values: dict[str, Any]) -> Tensor:
        x = values[self.inputs[0]]
        pixels = x.shape[-1] * x.shape[-2]
        steps = x.to(torch.int64).sum((-2, -1), keepdim=self.keep) - pixels * self.grid.zero
        # A mean of no pixels is NaN, as in torch.
        return steps.float() * self.factor(pixels) if pixels else torch.full_like(steps, math.nan, dtype=torch.float32)


@dataclass
class QuantizedGate(Node):
    """The product of an image of codes and a float32 factor for each of its channels, [images, channels, 1, 1].

    Attributes:
        grids: those of the image and of the product.
    """

    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        self.grids = tuple(Grid(*grid) for grid in self.grids)

    def ratio(self) -> float:
        """Return what a factor is multiplied by, for steps of the product."""
        return float(torch.tensor(self.grids[0].scale / self.grids[1].scale, dtype=torch.float32))

    def run(self, values: dict[str, Any]) -> Tensor:
        image, factors = (values[name] for name in self.inputs)
        zero = self.grids[1].zero
        steps = (self.grids[0].steps(image) * (factors * self.ratio())).nan_to_num(0.0).clamp(-zero, TOP - zero)
        return (torch.round(steps) + zero).to(torch.uint8)


class _Products:
    """The common part of quantized layers: sums of products of integers, and their scales."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    grids: tuple[Grid, ...]

    dtypes: ClassVar = (torch.int8, torch.int32)

    def __post_init__(self) -> None:
        self.grids = tuple(Grid(*grid) for grid in self.grids)
        sums = self.weight.flatten(1).to(torch.int16).abs().sum(1, dtype=torch.int64)
        # Computed here, because `run` may be traced with tensors that have no values.
        self.reach = TOP * int(sums.max()) if sums.numel() else 0
        self.is_small = self.reach < EXACT

    def span(self) -> int:
        """Return the largest absolute value that a partial sum can have."""
        largest = int(self.bias.to(torch.int64).abs().max()) if self.bias.numel() else 0
        return 2 * self.reach + largest

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the steps of codes and the weight in a dtype in which their sums of products are exact."""
        dtype = torch.float32 if self.is_small else torch.float64
        return x.to(dtype) - self.grids[0].zero, self.weight.to(dtype)

    def scaled(self, products: Tensor, factors: Tensor, dims: int) -> Tensor:
        """Return sums of products plus the bias, times a factor for each channel; channels are `dims` from the end."""
        shape = (-1, *[1] * (dims - 1))
        sums = products.to(torch.int64) + self.bias.view(shape)
        return sums.to(torch.int32).float() * factors.view(shape)


@dataclass
class QuantizedConvolution(_Products, Convolution):
    """A convolution from codes to codes: weight int8, bias int32 in units of scale * the input's scale.

    Attributes:
        scale: [out] float32, the weight's scales.
        grids: the input's, the output's, and if a sum is fused the residual's.
        table: an activation after the clamp: [256] uint8, the output's code for each code before it; None: none.
        before: the grid of the codes before the activation.
    """

    scale: Tensor = field(kw_only=True)
    grids: tuple[Grid, ...] = field(kw_only=True)
    table: Tensor | None = field(default=None, kw_only=True)
    before: Grid | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.before is not None:
            self.before = Grid(*self.before)

    @property
    def rounded(self) -> Grid:
        """The grid to which the sums are rounded."""
        return self.grids[1] if self.before is None else self.before

    def factors(self) -> Tensor:
        """Return what the sums are multiplied by for steps of that grid, [out], rounded as onnxruntime rounds it."""
        return self.scale * self.grids[0].scale / self.rounded.scale

    def residual_factor(self) -> float:
        """Return what the residual's steps are multiplied by for steps of that grid; 0 without a residual."""
        if len(self.grids) < 3:
            return 0.0
        return float(torch.tensor(self.grids[2].scale / self.rounded.scale, dtype=torch.float32))

    def run(self, values: dict[str, Any]) -> Tensor:
        x, weight = self.steps(values[self.inputs[0]])
        products = F.conv2d(x.contiguous(), weight, None, self.stride, self.padding, self.dilation, self.groups)
        y = self.scaled(products, self.factors(), 3)
        if len(self.inputs) > 1:
            y = y + self.grids[2].steps(values[self.inputs[1]]) * self.residual_factor()
        y = torch.round(y.clamp(*self.rounded.limits(self.clamp)))
        codes = (y + self.rounded.zero).to(torch.uint8)
        return codes if self.table is None else self.table[codes.long()]


@dataclass
class QuantizedLinear(_Products, Linear):
    """A linear layer from codes [rows, in] to float32; the attributes are those of a quantized convolution."""

    scale: Tensor = field(kw_only=True)
    grids: tuple[Grid, ...] = field(kw_only=True)

    def factors(self) -> Tensor:
        """Return what the sums are multiplied by, [out]."""
        return (self.scale.double() * self.grids[0].scale).float()

    def run(self, values: dict[str, Any]) -> Tensor:
        x, weight = self.steps(values[self.inputs[0]])
        return self.scaled(F.linear(x, weight), self.factors(), 1).clamp(*self.clamp)


def grids_of_codes(nodes: Iterable[Node]) -> dict[str, Grid]:
    """Return the grids by the names of the values that are codes."""
    grids: dict[str, Grid] = {}
    for node in nodes:
        match node:
            case Quantize():
                grids[node.name] = node.grid
            case QuantizedConvolution() | QuantizedGate():
                grids[node.name] = node.grids[1]
            case MaxPool() | Call() if node.inputs and node.inputs[0] in grids:
                grids[node.name] = grids[node.inputs[0]]
    return grids
