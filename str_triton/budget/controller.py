"""Meets a named budget exactly: one offset common to all raw thresholds moves the total along a schedule.

The layers' thresholds relative to each other are the *distribution*; the offset is the *amount*. A weight w whose raw
threshold is r is pruned from the offset g^-1(|w|) - r on, so that the offset for a given number of survivors (or their
cost in FLOPs) is the k-th of these values: `select` finds it in two passes over the weights, on the device. Where the
target names each layer's share, every layer has an offset of its own, and no distribution is left to choose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.budget.count import count, counted_layers
from str_triton.budget.offset_controller import OffsetController
from str_triton.budget.select import select
from str_triton.budget.target import Target
from str_triton.nn import STRLayer, str_layers

FLOP_EXPONENT = 0.2  # More costs accuracy (docs/exact-budgets.md).


@dataclass
class _Layer:
    """A thresholded weight, by the first of the layers that use it."""

    name: str
    module: STRLayer
    cost: int  # of one surviving weight towards the target: 1, or its multiply-adds
    flops: int  # multiply-adds of one weight; 0 if they were not counted
    floor: int = 0  # weights that survive in any case

    @property
    def raw(self) -> nn.Parameter:
        return self.module.raw_threshold

    @property
    def size(self) -> int:
        return self.module.dense_weight.numel()


class SparsityController(OffsetController):
    """Drives the thresholds of a sparsified model to an exact budget.

        controller = SparsityController(model, Target(sparsity=0.9))
        for i in range(steps):
            ...                             # forward, backward
            optimizer.step()
            controller.step((i + 1) / steps)

    The solve runs every `interval` steps and at progress 1, without host synchronization. In between the survivors
    drift a little: evaluate, and write checkpoints, inside `with controller.exact()`, or after `solve()`.

    Args:
        model: a sparsified model.
        target: what to reach. Sparsity is met to within one weight, FLOPs to within one weight's FLOPs, at every solve.
            Of a layer with a share of its own round(share * weights) are zero at the end.
        schedule: "cubic" (fast first, as in magnitude pruning), "linear" or "constant" from progress `begin` to `end`;
            before, all weights survive, and after, the target holds.
        example_input: for a target in FLOPs, as in `count`.
        distribution: "fixed": the thresholds keep the ratios (g = "exp") that they have now, all equal after
            `sparsify`, and need no gradients. "flop-aware": the same, after a first step that makes each threshold
            larger in proportion to (FLOPs per weight of example_input) ** 0.2. "learned": the optimizer moves them,
            slowly and within bounds, in the first third of training.
        floor: share of the survivors that a layer would have if all were pruned alike, which it keeps in any case (but
            never more than one weight per filter, and at least one weight), so that no layer is emptied. 0: no floor,
            and none where the target names each layer's share.
        interval: steps between solves.
        straight_through_until: progress until which layers with the straight-through gradient keep it. From then on
            theirs is the masked one: at high sparsity the steps of the pruned weights, noise for the most part, would
            otherwise drown the survivors (docs/methods.md). 1: they keep it throughout.

    Raises:
        ValueError: a model without thresholds, a target that excluded layers make impossible or that names other
            layers than the thresholded ones, a target in FLOPs without example_input, or arguments out of range.
    """

    DISTRIBUTIONS = ("fixed", "flop-aware", "learned")

    def __init__(
        self,
        model: nn.Module,
        target: Target,
        *,
        schedule: str = "cubic",
        begin: float = 0.0,
        end: float = 0.7,
        example_input: Tensor | tuple | Mapping[str, Any] | None = None,
        distribution: str = "fixed",
        floor: float = 0.5,
        interval: int = 20,
        straight_through_until: float = 0.5,
    ) -> None:
        super().__init__(schedule=schedule, begin=begin, end=end, distribution=distribution, interval=interval)
        if not 0 <= straight_through_until <= 1:
            raise ValueError(f"straight_through_until must be in [0, 1], got {straight_through_until}")
        self.straight_through_until = straight_through_until
        self.target = target
        self._layers, self._others, self._fixed, self._dense = _inventory(
            model, target, example_input, count_flops=target.flops is not None or distribution == "flop-aware"
        )
        shared = len({id(layer.raw) for layer in self._layers}) < len(self._layers)
        if shared and (floor or distribution == "flop-aware" or target.layers is not None):
            raise ValueError(
                "one raw threshold for several weights can neither keep a floor or a share in each nor be flop-aware: "
                "sparsify with another granularity, or pass floor=0, distribution='fixed' and no target by layers"
            )
        if target.layers is None:
            self._keep = self._final_cost()
            self._set_floors(floor)
        else:
            self._check_layers(target.layers)
        if distribution == "flop-aware":
            for layer in self._layers:
                layer.module.scale_threshold(max(layer.flops, 1) ** FLOP_EXPONENT)
        modules = str_layers(model).values()
        self._straight_through = [module for module in modules if module.gradient == "straight_through"]
        self._take((layer.raw for layer in self._layers), modules)
        self._set_gradient()

    def _advance(self, progress: float) -> None:
        super()._advance(progress)
        self._set_gradient()

    def _set_gradient(self) -> None:
        gradient = "straight_through" if self.progress < self.straight_through_until else "masked"
        for module in self._straight_through:
            if module.gradient != gradient:  # at every step: nn.Module's assignment is slow
                module.gradient = gradient

    def _check_layers(self, shares: Mapping[str, float]) -> None:
        if self.distribution != "fixed":
            raise ValueError(f"the target names each layer's share, which leaves no distribution {self.distribution!r}")
        names = {layer.name for layer in self._layers}
        if missing := sorted(names - shares.keys()):
            raise ValueError(f"the target names no share for the thresholded layer {missing[0]!r}")
        if unknown := sorted(shares.keys() - names):
            raise ValueError(f"the target names {unknown[0]!r}, which is no thresholded layer of the model")

    def _final_cost(self) -> int:
        """What the thresholded weights may cost at the end."""
        if self.target.flops is not None:
            keep = self.target.flops - self._fixed
        else:
            others = sum(getattr(module, attribute).numel() for module, attribute in self._others)
            total = self._dense + others
            nonzeros = self.target.nonzeros
            keep = (total - round(self.target.sparsity * total) if nonzeros is None else nonzeros) - others
        return min(keep, self._dense)

    def _set_floors(self, floor: float) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {floor}")
        density = max(self._keep, 0) / self._dense
        for layer in self._layers:
            uniform = int(floor * density * layer.size)
            layer.floor = max(1, min(uniform, layer.module.dense_weight.shape[0])) if floor else 0
        least = sum(layer.floor * layer.cost for layer in self._layers)
        if self._keep < least:
            unit = "FLOPs" if self.target.flops is not None else "weights"
            raise ValueError(
                f"{self.target} cannot be met: it leaves {self._keep:,} {unit} to the thresholded layers, which need "
                f"{least:,} or more; excluded layers and pools count as dense"
            )

    def _cut(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        if self.target.layers is not None:
            return self._cut_each(self.target.layers)
        held_back = {id(raw): held for raw, held in zip(self._raws, self._held_back, strict=True)}
        critical, caps = [], {}
        for layer in self._layers:
            values, cap = _critical_offsets(layer, held_back[id(layer.raw)])
            critical.append(values)
            caps[id(layer.raw)] = cap
        below, above = select(critical, [layer.cost for layer in self._layers], self._budget_now())
        return below, above, [caps[id(raw)] for raw in self._raws]

    def _cut_each(self, shares: Mapping[str, float]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Each layer on its own; the raw thresholds are one per layer and stand in the layers' order."""
        done, device, cuts = self._done(), self._raws[0].device, []
        for layer in self._layers:
            values = layer.module.pruning_offsets().flatten().to(torch.float32)
            keep = layer.size - round(done * round(shares[layer.name] * layer.size))
            cuts.append(select([values], [1], torch.full((), keep, device=device)))
        below, above = (torch.stack(cut) for cut in zip(*cuts, strict=True))
        return below, above, [torch.full((), torch.inf, device=device)] * len(cuts)

    def _budget_now(self) -> Tensor:
        """What the thresholded weights may cost now; int64 on their device."""
        done = self._done()
        keep = torch.full((), self._dense - round(done * (self._dense - self._keep)), device=self._raws[0].device)
        if self.target.flops is None and done == 1:  # Zeros in layers without a threshold count towards the target.
            for module, attribute in self._others:
                weight = getattr(module, attribute)
                keep += weight.numel() - weight.count_nonzero()
        return keep

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"layers": None if self.target.layers is None else dict(self.target.layers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("layers") != self.target.layers:
            raise ValueError("the state was made for another target by layers; has the file that names it changed?")
        super().load_state_dict(state)
        self._set_gradient()


def _inventory(
    model: nn.Module, target: Target, example_input: Any, count_flops: bool
) -> tuple[list[_Layer], list, int, int]:
    """The thresholded weights, the counted weights without a threshold, what is fixed, and the cost of all weights."""
    modules = str_layers(model)
    if not modules:
        raise ValueError("the model has no thresholded layers: call sparsify(model) first")
    costs, fixed = {}, 0
    if count_flops:
        if example_input is None:
            raise ValueError("to count FLOPs the controller needs example_input, an input of the model")
        budget = count(model, example_input)
        costs = {row.name: row.dense_flops // row.params for row in budget.rows if row.params}
    layers, others = [], []
    for name, module, attribute in counted_layers(model):
        if isinstance(module, STRLayer):
            flops = costs.get(name, 0)
            layers.append(_Layer(name, module, 1 if target.flops is None else flops, flops))
        else:
            others.append((module, attribute))
    dense = sum(layer.cost * layer.size for layer in layers)
    if dense == 0:
        raise ValueError(
            "the thresholded layers cost no FLOPs for this example_input, so that no threshold can meet a target"
        )
    if target.flops is not None:
        fixed = budget.dense_flops - dense
    return layers, others, fixed, dense


def _critical_offsets(layer: _Layer, held_back: Tensor) -> tuple[Tensor, Tensor]:
    """The offset from which each weight is pruned, inf for those of the floor; and the largest one that keeps these.

    Offsets count from where the raw threshold would be if no floor had held it back.
    """
    values = (layer.module.pruning_offsets() - held_back).flatten().to(torch.float32)
    if layer.floor == 0:
        return values, torch.full((), torch.inf, device=values.device)
    top = values.topk(min(layer.floor + 1, values.numel()))
    values.index_fill_(0, top.indices[: layer.floor], torch.inf)
    return values, (top.values[layer.floor - 1] + top.values[-1]) / 2
