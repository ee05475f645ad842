"""`quantization_aware`: train with the rounding that `quantize` will do, where calibration alone loses too much."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from str_triton.deploy.sparse.graph.quantized import LARGEST, SMALLEST, TOP, Grid
from str_triton.deploy.sparse.quantize.quantize import ROUNDS, calibration_calls, quantize
from str_triton.deploy.sparse.quantize.ranges import Range
from str_triton.deploy.sparse.surroundings import plain_torch
from str_triton.nn import thresholded_weights

ROUNDED = (nn.Conv2d, nn.Linear)
PRODUCTS = (F.conv2d, F.linear)


@contextlib.contextmanager
def quantization_aware(
    model: nn.Module, batches: Iterable[Any], *, method: str = "percentile"
) -> Iterator[tuple[str, ...]]:
    """Round the weights and inputs of `model`'s layers inside a `with` block, so that training adapts to int8.

    The layers are the `nn.Conv2d` and `nn.Linear` that `quantize` can run on integers. Weights are rounded in each
    forward pass with a scale for each output channel, inputs on the grid that `batches` give at the start. Gradients
    pass through the rounding, except where an input is beyond its grid (`torch.fake_quantize_per_channel_affine`,
    `torch.fake_quantize_per_tensor_affine`). Zero weights stay zero and get no gradient; in a layer of `sparsify` the
    thresholds decide which weights are zero. After the block the layers compute in float32 again: then call `quantize`.

    The model keeps its layers, its parameters and the keys of its state dict. Optimizers and moving averages may be
    created before the block or in it. Training may switch between `train` and `eval`. A copy of the model that is made
    in the block rounds for good; its state dict is that of a plain model.

    Args:
        model: a trained model on the CPU that `quantize` takes; it is changed in place.
        batches: inputs like those of inference, as for `quantize`.
        method: how the range of an input is found, as for `quantize`.

    Yields:
        The names of the layers that are rounded.

    Raises:
        TypeError, ValueError: as `quantize`; no layer of the model can run on integers; or its layers round already.
    """
    given = calibration_calls(batches)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        network = quantize(model, given, method=method, bound=math.inf)
        modules = dict(model.named_modules())
        layers = {
            layer.label: modules[layer.label]
            for layer in network.report.layers
            if not layer.left and isinstance(modules.get(layer.label), ROUNDED)
        }
        if not layers:
            raise ValueError(f"{type(model).__name__} has no nn.Conv2d or nn.Linear that can run on integers")
        grids = _input_grids(model, layers, given, method)
    finally:
        for module, mode in modes.items():
            module.training = mode
    thresholded = {id(weight.module) for weight in thresholded_weights(model)}
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_rounded(layer, grids[name], id(layer) in thresholded))
        yield tuple(layers)


def _input_grids(model: nn.Module, layers: dict[str, nn.Module], batches: list[tuple], method: str) -> dict[str, Grid]:
    """Return the grid of each layer's input on the batches."""
    ranges = {name: Range() for name in layers}
    for note in (Range.widen, Range.count):
        with contextlib.ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(_changed(layer, partial(_note, partial(note, ranges[name]))))
            stack.enter_context(plain_torch())
            for batch in batches:
                model(*batch)
    return {name: seen.grid(method) for name, seen in ranges.items()}


def _note(note: Callable[[Tensor], None], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    note(x)
    return x, weight


@contextlib.contextmanager
def _rounded(layer: nn.Module, grid: Grid, is_thresholded: bool) -> Iterator[None]:
    """Round a layer's weight and input."""
    weight: Any = layer.weight
    kept = torch.ones_like(weight, dtype=torch.bool) if is_thresholded else weight.detach() != 0
    with _changed(layer, partial(_round, grid, kept)):
        vars(layer)[ROUNDS] = True
        try:
            yield
        finally:
            del vars(layer)[ROUNDS]
            if not is_thresholded and isinstance(layer.weight, nn.Parameter):
                with torch.no_grad():  # An optimizer's momentum from before moves zeros without any gradient.
                    layer.weight.masked_fill_(~kept, 0.0)


@contextlib.contextmanager
def _changed(layer: nn.Module, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let a layer multiply what `change` makes of its input and weight.

    The forward of the instance, not a parametrization of torch: parameters keep their order and names, and copies of
    the layer stay whole when the original changes back.
    """
    own = vars(layer).get("forward")
    vars(layer)["forward"] = partial(_forward, layer.forward, change)
    try:
        yield
    finally:
        if own is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = own


def _forward(forward: Callable[..., Tensor], change: Any, *args: Any, **kwargs: Any) -> Tensor:
    with _Change(change):
        return forward(*args, **kwargs)


class _Change(TorchFunctionMode):
    """Changes the input and weight of products, after thresholds, padding and whatever else a layer's forward does."""

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func not in PRODUCTS:
            return func(*args, **given)
        named = dict(zip(("input", "weight"), args, strict=False)) | given
        x, weight = self.change(named.pop("input"), named.pop("weight"))
        return func(x, weight, *args[2:], **named)


def _round(grid: Grid, kept: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values that bytes and int8 weights represent, with a scale for each output channel."""
    x = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero, 0, TOP)
    weight = torch.where(kept, weight, 0.0)
    largest = weight.detach().flatten(1).abs().amax(1)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).clamp(min=SMALLEST)
    offset = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    return x, torch.fake_quantize_per_channel_affine(weight, scale, offset, 0, -LARGEST, LARGEST)
