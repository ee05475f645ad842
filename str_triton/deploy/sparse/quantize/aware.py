"""`quantization_aware`: train with the rounding that `quantize` will do, where calibration alone loses too much."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from str_triton.deploy.sparse.graph.quantized import LARGEST, SMALLEST, TOP, Grid
from str_triton.deploy.sparse.quantize.quantize import quantize
from str_triton.deploy.sparse.quantize.ranges import Range
from str_triton.deploy.sparse.surroundings import plain_torch

ROUNDED = (nn.Conv2d, nn.Linear)


@contextlib.contextmanager
def quantization_aware(
    model: nn.Module, batches: Iterable[Any], *, method: str = "percentile"
) -> Iterator[tuple[str, ...]]:
    """Round the weights and inputs of `model`'s layers inside a `with` block, so that training adapts to int8.

    The layers are the `nn.Conv2d` and `nn.Linear` that `quantize` can run on integers. Weights are rounded in each
    forward pass with a scale for each output channel, inputs on the grid that `batches` give at the start. Gradients
    pass through the rounding, except where an input is beyond its grid (`torch.fake_quantize_per_channel_affine`,
    `torch.fake_quantize_per_tensor_affine`). Zero weights stay zero and get no gradient. After the block the model has
    its own layers and its trained float32 weights again: then call `quantize`.

    Optimizers may be created before the block or in it. Training may switch between `train` and `eval`.

    Args:
        model: a trained model on the CPU that `quantize` takes; it is changed in place.
        batches: inputs like those of inference, as for `quantize`.
        method: how the range of an input is found, as for `quantize`.

    Yields:
        The names of the layers that are rounded.

    Raises:
        TypeError, ValueError: as `quantize`; or no layer of the model can run on integers.
    """
    given = [batch if type(batch) is tuple else (batch,) for batch in ([] if isinstance(batches, Tensor) else batches)]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        network = quantize(model, batches if isinstance(batches, Tensor) else given, method=method, bound=math.inf)
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
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_rounded(layer, grids[name]))
        yield tuple(layers)


def _input_grids(model: nn.Module, layers: dict[str, nn.Module], batches: list[tuple], method: str) -> dict[str, Grid]:
    """Return the grid of each layer's input on the batches."""
    ranges = {name: Range() for name in layers}
    for note in (Range.widen, Range.count):
        hooks = [layer.register_forward_pre_hook(partial(_note, note, ranges[name])) for name, layer in layers.items()]
        try:
            with plain_torch():
                for batch in batches:
                    model(*batch)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: seen.grid(method) for name, seen in ranges.items()}


def _note(note: Any, seen: Range, layer: nn.Module, inputs: tuple) -> None:
    note(seen, inputs[0])


@contextlib.contextmanager
def _rounded(layer: nn.Module, grid: Grid) -> Iterator[None]:
    """Round a layer's weight and input."""
    was_plain = not parametrize.is_parametrized(layer, "weight")
    weight: Any = layer.weight
    parametrize.register_parametrization(layer, "weight", _RoundedWeight(weight.detach() != 0))
    parametrizations: Any = layer.parametrizations
    every = parametrizations.weight
    own = every[-1]
    hook = layer.register_forward_pre_hook(lambda _, inputs: (_round_input(inputs[0], grid), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
        if was_plain and len(every) == 1:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        else:  # Another library's parametrization, or one of this package's, stays.
            kept = [made for made in every if made is not own]
            del every[:]
            every.extend(kept)


def _round_input(x: Tensor, grid: Grid) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero, 0, TOP)


class _RoundedWeight(nn.Module):
    """The values that int8 weights represent, with a scale for each output channel: [out, ...] to [out, ...]."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept: Tensor
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        weight = torch.where(self.kept, weight, 0.0)
        largest = weight.detach().flatten(1).abs().amax(1)
        scale = torch.where(largest > 0, largest / LARGEST, 1.0).clamp(min=SMALLEST)
        offset = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, scale, offset, 0, -LARGEST, LARGEST)
