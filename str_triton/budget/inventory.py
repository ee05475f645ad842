"""The inventory of a sparsity controller: the weights that it controls, the other weights, and their costs."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.budget.count import count, counted_weights, some
from str_triton.budget.names import unwrapped_names
from str_triton.budget.processes import Processes, nonzeros
from str_triton.budget.raw_thresholds import raws_for_rows
from str_triton.budget.target import Costs, Target
from str_triton.files import percent
from str_triton.nn import Matrix, ThresholdedWeight, require_one_threshold, require_own_weights, thresholded_weights
from str_triton.nn.shards import local, reshard

UNCOVERED = 0.01  # Share of uncovered weights from which the controller warns.


@dataclass
class Layer:
    """A thresholded weight, by the first of the layers that use it."""

    weight: ThresholdedWeight
    cost: int  # of one surviving element towards the target: 1, or its multiply-adds
    flops: int  # multiply-adds of one element; 0 if they were not counted
    floor: int = 0  # elements that survive in any case

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def raw(self) -> nn.Parameter:
        return self.weight.raw

    @property
    def size(self) -> int:
        return self.weight.dense.numel()


def take_inventory(
    model: nn.Module, target: Target, example_input: Any, count_flops: bool
) -> tuple[list[Layer], list[Matrix], Costs]:
    """Return the thresholded weights, the covered weights without a threshold, and the costs of all."""
    reshard(model)
    uses = [use for use in thresholded_weights(model) if use.dense.numel()]
    if not uses:
        raise ValueError("the model has no thresholded layers: call sparsify(model) first")
    first: dict[int, ThresholdedWeight] = {}
    for use in uses:
        first.setdefault(id(use.dense), use)
    require_own_weights(first.values())
    require_one_threshold(uses)
    raws = [use.raw for use in first.values()]
    infinities = Processes.of(raws).sum_once([local(raw).isinf().sum() for raw in raws], raws)
    for use, infinite in zip(first.values(), infinities, strict=True):
        if infinite > 0:
            raise ValueError(
                f"the thresholds of {use.name!r} are infinite, and no controller can move them: sparsify(keep_zeros="
                "True) makes such ones. For a target beyond the present zeros call sparsify(gradient='masked') instead"
            )
    flops, total = {}, 0
    if count_flops:
        if example_input is None:
            raise ValueError("to count FLOPs the controller needs example_input, an input of the model")
        budget = count(model, example_input)
        flops = {row.name: row.dense_flops // row.params for row in budget.rows if row.params}
        total = budget.dense_flops
    layers = []
    for use in first.values():
        own = flops.get(use.name, 0)
        layers.append(Layer(use, own if target.counts_flops else 1, own))
    thresholded = {layer.name for layer in layers}
    weights = counted_weights(model)
    others = [weight for weight in weights if weight.covered and weight.name not in thresholded]
    dense = sum(layer.cost * layer.size for layer in layers)
    if dense == 0:
        raise ValueError(
            "the thresholded layers cost no FLOPs for this example_input, so that no threshold can meet a target"
        )
    _warn_of_uncovered(weights)
    return layers, others, Costs(dense, sum(other.value.numel() for other in others), total)


def covered_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of the weights of a model that targets count, in the order of the shapes."""
    weights = [weight for weight in counted_weights(model) if weight.covered]
    # A weight's own shape needs no computation of its value.
    return sorted(tuple((w.sources[0] if len(w.sources) == 1 else w.value).shape) for w in weights)


def present(model: nn.Module, weights: list[Matrix]) -> list[Matrix]:
    """Return the weights of a model that have the names of the given ones."""
    now = unwrapped_names({weight.name: weight for weight in counted_weights(model)})
    return [now[name] for name in unwrapped_names({weight.name: weight for weight in weights}) if name in now]


def require_own_thresholds(layers: list[Layer]) -> None:
    """Raise ValueError if several layers have one raw threshold."""
    if len({id(layer.raw) for layer in layers}) < len(layers):
        raise ValueError(
            "one raw threshold for several weights can neither keep a floor or a share in each nor be flop-aware: "
            "sparsify with another granularity, or pass floor=0, distribution='fixed' and no target by layers; "
            "weights that were tied once must be tied again after to_empty or load_state_dict(assign=True)"
        )


def set_floors(layers: list[Layer], floor: float, keep: int, target: Target) -> None:
    """Set how many elements of each layer survive in any case, of survivors that cost `keep` together.

    Raises ValueError if the floors cost more.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor}")
    density = max(keep, 0) / sum(layer.cost * layer.size for layer in layers)
    for layer in layers:
        uniform = int(floor * density * layer.size)
        layer.floor = max(1, min(uniform, layer.weight.dense.shape[0])) if floor else 0
    least = sum(layer.floor * layer.cost for layer in layers)
    if keep < least:
        unit = "FLOPs" if target.counts_flops else "weights"
        raise ValueError(
            f"{target} cannot be met: excluded and frozen layers and pools count as dense, which leaves "
            f"{keep:,} {unit} to the thresholded layers; these need {least:,} or more"
        )


def check_shares(layers: list[Layer], shares: Mapping[str, float], distribution: str) -> None:
    """Raise ValueError unless a target by layers names each layer, no other one, and is the only distribution."""
    if distribution != "fixed":
        raise ValueError(f"the target names each layer's share, which leaves no distribution {distribution!r}")
    names = {layer.name for layer in layers}
    if missing := sorted(names - shares.keys()):
        raise ValueError(f"the target names no share for the thresholded layer {missing[0]!r}")
    if unknown := sorted(shares.keys() - names):
        raise ValueError(f"the target names {unknown[0]!r}, which is no thresholded layer of the model")


@torch.no_grad()
def present_sparsity(layers: list[Layer], others: list[Matrix]) -> float:
    """Return the share of zeros in all these weights, as the thresholds are now. Synchronizes with the GPU."""
    values = [other.value for other in others]
    left = survivors(layers).sum() + nonzeros(values).sum()
    return 1 - int(left) / (sum(layer.size for layer in layers) + sum(value.numel() for value in values))


@torch.no_grad()
def survivors(layers: list[Layer]) -> Tensor:
    """Return how many elements of each layer are left, as the thresholds are now; int64 [layers]."""
    uses = [layer.weight for layer in layers]
    weights = [use.dense for use in uses]
    processes = Processes.of(weights)
    raws = raws_for_rows(uses, processes)
    own = [use.holder.apply_threshold(local(use.dense), raw) for use, raw in zip(uses, raws, strict=True)]
    return processes.sum_once([part.count_nonzero() for part in own], weights)


def warn_of_zeros(layers: list[Layer], keep: list[int]) -> None:
    """Warn of weights that have more zeros than a target asks for, so that nothing will be pruned there.

    keep: the budget of the nonzero weights of all layers together, or a number for each layer.
    """
    if any(layer.weight.dense.is_meta for layer in layers):
        return
    if sum(keep) >= sum(layer.cost * layer.size for layer in layers):
        return
    parts = []
    left = list(zip(layers, nonzeros([layer.weight.dense for layer in layers]).tolist(), strict=True))
    for pairs, most in zip([left] if len(keep) == 1 else [[pair] for pair in left], keep, strict=True):
        group = [layer for layer, _ in pairs]
        size = sum(layer.size for layer in group)
        zeros = size - sum(number for _, number in pairs)
        if zeros and sum(layer.cost * number for layer, number in pairs) < most:
            where = "" if len(keep) == 1 else f" of {group[0].name}"
            parts.append(f"{zeros:,} of the {size:,} thresholded weights{where} ({percent(zeros / size)})")
    if parts:
        warnings.warn(
            f"more weights are zero already than the target asks for: {some(parts)}. No others will be pruned there, "
            "and the model stays sparser than the target unless training moves zeros to other values",
            stacklevel=3,
        )


def _warn_of_uncovered(weights: list[Matrix]) -> None:
    """Warn where more than 1 % of a model's weights are of kinds that `sparsify` does not cover."""
    sizes = [weight.value.numel() for weight in weights]
    uncovered = [not (weight.covered or weight.excluded) for weight in weights]
    share = sum(size for size, is_left in zip(sizes, uncovered, strict=True) if is_left) / max(1, sum(sizes))
    if share > UNCOVERED:
        names = [weight.name for weight, is_left in zip(weights, uncovered, strict=True) if is_left]
        warnings.warn(
            f"the target covers {percent(1 - share, 1)} of the model's weights; these are not covered: "
            f"{some(names)}. Name them in sparsify(..., parameters=[...]) to sparsify them, or in exclude=[...] to "
            "leave them out",
            stacklevel=4,
        )
