"""Counts what a model costs by watching one forward pass."""

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from str_triton.budget.budget import Budget, LayerBudget
from str_triton.budget.processes import Processes
from str_triton.budget.products import Functions, Products, nonzeros
from str_triton.budget.raw_thresholds import raws_for_rows
from str_triton.nn import (
    Matrix,
    ThresholdedWeight,
    matrices,
    require_one_threshold,
    thresholded_weights,
    warn_if_unfinished,
)
from str_triton.nn.shards import full, local, reshard

POOLS = "(average pools)"


def count(model: nn.Module, example_input: Tensor | tuple | Mapping[str, Any]) -> Budget:
    """Count what `model` costs for `example_input`, by one forward pass in eval mode.

    Every Parameter of two or more dimensions has a row, in the order of `model.named_modules()`, except biases, the
    parameters of norms, and thresholds. A weight that several layers share has one row, under the name of the first
    layer. Its elements count once, its FLOPs at each use. A weight with a threshold counts by its thresholded values.

    A row is *covered* if `sparsify` knows the kind of weight: weights of convolutions (also transposed), of linear,
    bilinear, embedding and recurrent layers and of `nn.MultiheadAttention`, thresholded or left dense. Other Parameters
    are not covered: those of a layer of your own, position embeddings, the factors of a `LowRankWeight`.
    `Budget.params`, `nonzeros` and `sparsity` describe the covered rows, `total_sparsity` all rows.

    FLOPs are multiply-adds of these weights, covered or not, for the batch as given, times their density; one
    multiply-add is one FLOP and padding counts as input. An average pool costs its input elements (`F.avg_pool*`,
    `F.adaptive_avg_pool*` and their modules, together in the row `"(average pools)"`). Embeddings, max pools, norms,
    activations, biases, elementwise products and products of two activations, such as attention scores, cost nothing.
    A layer that the forward leaves out costs no FLOPs. On the meta device there are no values, and every weight counts
    as dense.

    Modes of modules, buffers, random states (CPU and CUDA), gradients and hooks do not change, also if the forward
    raises. Hooks of the model run. Models made with `torch.compile` run uncompiled.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dictionary of keywords.

    Raises:
        TypeError: if `example_input` is something else.
        ValueError: if a lazy layer has not seen its first input yet.

    Warns:
        UserWarning: weights that contain NaN; a weight that an operator of another library uses, whose FLOPs are not
            known; a thresholded layer whose dense weight the forward reads; a model that does not meet its
            controller's target.
    """
    inputs = _arguments(example_input)
    warn_if_unfinished(model)
    reshard(model)
    with _undisturbed(model, inputs):
        weights = counted_weights(model)
        rows = _rows(model, weights)
        products, functions = _watched(model, weights, inputs, {row.name: (row.params, row.nonzeros) for row in rows})
    reshard(model)
    for operator, names in products.hidden.items():
        warnings.warn(
            f"count: the FLOPs of {operator}, which uses {some(sorted(names))}, are not known and left out",
            stacklevel=2,
        )
    _warn_of_dense_reads(products, 3)
    rows = [
        replace(row, dense_flops=products.dense.get(row.name, 0), flops=products.sparse.get(row.name, 0))
        for row in rows
    ]
    if functions.pooled:
        rows.append(LayerBudget(POOLS, 0, 0, functions.pooled, functions.pooled))
    return Budget(rows)


def warn_if_thresholds_are_bypassed(model: nn.Module, args: tuple, kwargs: dict[str, Any], stacklevel: int) -> None:
    """Warn if the forward of `model` reads dense weights past their thresholds, for these arguments."""
    if any(thresholded_weights(model)):
        with _undisturbed(model, (args, kwargs)):
            products, _ = _watched(model, counted_weights(model), (args, kwargs), {})
        _warn_of_dense_reads(products, stacklevel + 1)


def counted_weights(model: nn.Module) -> list[Matrix]:
    """Return the weights that `count` has rows for, in its order. Raises ValueError for a lazy layer."""
    weights = list(matrices(model))
    for weight in weights:
        if any(map(nn.parameter.is_lazy, weight.sources)):
            raise ValueError(
                f"layer {weight.name!r} is lazy and has no weight yet: run the model once before counting it"
            )
    return weights


def _watched(
    model: nn.Module, weights: Sequence[Matrix], inputs: tuple[tuple, dict], counted: Mapping[str, tuple[int, int]]
) -> tuple[Products, Functions]:
    """Run the model's forward pass once and return its products. `counted`: elements and nonzeros by name."""
    names = {weight.name for weight in thresholded_weights(model)}
    if isinstance(model, nn.DataParallel):
        model = model.module  # functional_call refuses the wrapper, whose replicas it could not reach.
    args, kwargs = tree_map_only(Tensor, torch.clone, inputs)  # An in-place layer may come first.
    products = Products(weights, (args, kwargs), names)
    functions = Functions(products)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with products.following(model, weights, counted), functions, products:
        functional_call(model, buffers, args, kwargs)
    return products, functions


def _warn_of_dense_reads(products: Products, stacklevel: int) -> None:
    if products.unthresholded:
        warnings.warn(
            f"the forward reads the dense weight of {some(sorted(products.unthresholded))} in place of "
            "calling the layer, so that its threshold has no effect there, and densify changes the outputs: name the "
            "weight in sparsify(..., parameters=[...]), which shows the thresholded one to every reader, or leave it "
            "out with exclude=[...]",
            stacklevel=stacklevel,
        )


def _rows(model: nn.Module, weights: Sequence[Matrix]) -> list[LayerBudget]:
    """Return a row for each weight, without FLOPs; warn of NaN."""
    all_uses = list(thresholded_weights(model))
    require_one_threshold(all_uses, equal=True)
    thresholded = {(id(weight.module), weight.attribute): weight for weight in all_uses}
    uses = [thresholded.get((id(weight.module), weight.attribute)) for weight in weights]
    values = [weight.value if use is None else use.dense for weight, use in zip(weights, uses, strict=True)]
    processes = Processes.of(values)
    raws = iter(raws_for_rows([use for use in uses if use is not None], processes))
    own_left, own_nan, means = [], [], []
    for value, use in zip(values, uses, strict=True):
        own, mean = local(value), None
        if use is not None:
            raw = next(raws)
            own = use.holder.apply_threshold(own, raw)
            mean = None if value.is_meta else _mean_threshold(use, raw)
        own_left.append(torch.tensor(nonzeros(own)))
        own_nan.append(torch.tensor(int(_has_nan(own))))
        means.append(mean)
    left, nan = (processes.sum_once(numbers, values).tolist() for numbers in (own_left, own_nan))
    if any(nan):
        with_nan = [weight.name or "(model)" for weight, number in zip(weights, nan, strict=True) if number]
        warnings.warn(
            f"count: {some(with_nan)} contain NaN, which counts as not zero: the sparsity says nothing here",
            stacklevel=3,
        )
    return [
        LayerBudget(weight.name, value.numel(), number, 0, 0, mean, weight.covered)
        for weight, value, number, mean in zip(weights, values, left, means, strict=True)
    ]


def _mean_threshold(use: ThresholdedWeight, raw: Tensor) -> float | None:
    """Return the mean of a weight's thresholds; `raw` is the raw threshold of this process's rows."""
    mean = float(use.holder.threshold_of(raw if use.raw.numel() == 1 else full(use.raw.detach())).mean())
    return None if mean == math.inf else mean  # Of kept zeros; JSON has no infinity.


def _has_nan(weight: Tensor) -> bool:
    # One sum shows NaN for most weights. A sum in float16 may overflow without a NaN.
    return not weight.is_meta and not bool(weight.sum().isfinite()) and bool(weight.isnan().any())


def some(names: Sequence[str]) -> str:
    """Return the first names, and how many follow."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


def _arguments(example_input: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    kind = type(example_input).__name__
    raise TypeError(f"example_input must be a tensor, a tuple of arguments or a dict of keywords, got {kind}")


@contextmanager
def _undisturbed(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Set eval mode without gradients for the block; put modes and random states back after it."""
    modes = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]
    devices = {t.device.index for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    # Nothing is compiled where dynamo was never imported, and the import takes a second.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    torch.clear_autocast_cache()  # A cast made before would be a weight of unknown origin.
    try:
        for module, _ in modes:
            module.training = False  # Not eval(): a model may override it, to merge weights for example.
        with torch.random.fork_rng(sorted(devices), device_type="cuda"), torch.no_grad(), eager:
            yield
    finally:
        for module, training in modes:
            module.training = training
