"""Meets a named budget exactly: one offset common to all raw thresholds moves the total along a schedule.

The layers' thresholds relative to each other are the *distribution*; the offset is the *amount*. A weight w whose raw
threshold is r is pruned from the offset g^-1(|w|) - r on, so that the offset for a given number of survivors (or their
cost in FLOPs) is the k-th of these values: `select` finds it in two passes over the weights, on the device.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.budget.count import count, counted_layers
from str_triton.budget.select import select
from str_triton.budget.target import SCHEDULES, Target
from str_triton.nn import STRLayer, str_layers

DISTRIBUTIONS = ("fixed", "flop-aware", "learned")
FLOP_EXPONENT = 0.2  # More costs accuracy (docs/exact-budgets.md).
# What the optimizer may do to learned thresholds: steps at full length kill a layer (docs/exact-budgets.md).
LEARNING_RATE = 0.1  # of its steps' length
BOUND = 0.5  # largest distance of a raw threshold from the mean
FREEZE = 0.35  # share of training after which the distribution stays


@dataclass
class _Layer:
    """A thresholded weight, by the first of the layers that use it."""

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


class SparsityController:
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
        schedule: "cubic" (fast first, as in magnitude pruning), "linear" or "constant" from progress `begin` to `end`;
            before, all weights survive, and after, the target holds.
        example_input: for a target in FLOPs, as in `count`.
        distribution: "fixed": the thresholds keep the ratios (g = "exp") that they have now, all equal after
            `sparsify`, and need no gradients. "flop-aware": the same, after a first step that makes each threshold
            larger in proportion to (FLOPs per weight of example_input) ** 0.2. "learned": the optimizer moves them,
            slowly and within bounds, in the first third of training.
        floor: share of the survivors that a layer would have if all were pruned alike, which it keeps in any case (but
            never more than one weight per filter, and at least one weight), so that no layer is emptied. 0: no floor.
        interval: steps between solves.

    Raises:
        ValueError: a model without thresholds, a target that excluded layers make impossible, a target in FLOPs
            without example_input, or arguments out of range.
    """

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
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
        if not 0 <= begin <= end <= 1:
            raise ValueError(f"begin and end must be 0 <= begin <= end <= 1, got {begin} and {end}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(map(repr, DISTRIBUTIONS))}, got {distribution!r}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.target = target
        self.schedule, self.begin, self.end = schedule, begin, end
        self.distribution = distribution
        self.interval = interval
        self.progress, self.steps = 0.0, 0
        self._training: list[Tensor] | None = None  # The raw thresholds to come back to, inside exact().
        self._layers, self._others, self._fixed, self._dense = _inventory(
            model, target, example_input, count_flops=target.flops is not None or distribution == "flop-aware"
        )
        self._raws = list({id(layer.raw): layer.raw for layer in self._layers}.values())
        if len(self._raws) < len(self._layers) and (floor or distribution == "flop-aware"):
            raise ValueError(
                "one raw threshold for several weights can neither keep a floor in each nor be flop-aware: "
                "sparsify with another granularity, or pass floor=0 and distribution='fixed'"
            )
        self._keep = self._final_cost()
        self._set_floors(floor)
        if distribution == "flop-aware":
            for layer in self._layers:
                layer.module.scale_threshold(max(layer.flops, 1) ** FLOP_EXPONENT)
        self._before = [raw.detach().clone() for raw in self._raws]  # What the optimizer's step begins with.
        self._held_back = [raw.new_zeros(()) for raw in self._before]
        for raw in self._raws:
            raw.requires_grad_(distribution == "learned")
        for module in str_layers(model).values():
            module.controlled = True

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

    def step(self, progress: float) -> None:
        """Call after `optimizer.step()`, with the share of training that is done, 0 to 1; at 1 the target is met."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        self.progress = progress
        if self.distribution == "learned":
            self._temper()
        if self.steps % self.interval == 0 or progress == 1:
            self.solve()
        self.steps += 1

    @torch.no_grad()
    def solve(self) -> None:
        """Move all raw thresholds by one offset so that the model costs what the schedule says now."""
        shifts, self._held_back = self._shifts()
        for raw, before, shift in zip(self._raws, self._before, shifts, strict=True):
            raw.add_(shift)
            before.add_(shift)

    def _shifts(self) -> tuple[list[Tensor], list[Tensor]]:
        """By how much to move each raw threshold, and how far its floor then holds it back from the common offset."""
        held_back = {id(raw): held for raw, held in zip(self._raws, self._held_back, strict=True)}
        critical, caps = [], {}
        for layer in self._layers:
            values, cap = _critical_offsets(layer, held_back[id(layer.raw)])
            critical.append(values)
            caps[id(layer.raw)] = cap
        below, above = select(critical, [layer.cost for layer in self._layers], self._budget_now())
        # Halfway, where rounding cannot move a weight across; nothing to cut, or nothing to keep, is one step away.
        offset = torch.where(below.isinf(), above - 1, torch.where(above.isinf(), below + 1, (below + above) / 2))
        offset = offset.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        held = [(offset - caps[id(raw)]).clamp(min=0) for raw in self._raws]
        return [offset - now + before for now, before in zip(held, self._held_back, strict=True)], held

    @torch.no_grad()
    def _temper(self) -> None:
        """Of what the optimizer's step did to the raw thresholds, keep what does no harm."""
        rate = LEARNING_RATE if self.progress <= FREEZE else 0.0
        mean = torch.cat([raw.flatten() for raw in self._raws]).mean()
        for raw, before in zip(self._raws, self._before, strict=True):
            raw.copy_(torch.lerp(before, raw, rate).clamp(mean - BOUND, mean + BOUND))
            before.copy_(raw)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the model costs exactly what the schedule says; on leaving, training goes on as if nothing had been.

        For evaluation and checkpoints: a state dict of the model taken inside holds the exact thresholds, and that of
        the controller the ones to go on with.
        """
        if self._training is not None:
            yield
            return
        self._training = [raw.detach().clone() for raw in self._raws]
        try:
            with torch.no_grad():
                for raw, shift in zip(self._raws, self._shifts()[0], strict=True):
                    raw.add_(shift)
            yield
        finally:
            with torch.no_grad():
                for raw, value in zip(self._raws, self._training, strict=True):
                    raw.copy_(value)
            self._training = None

    def state_dict(self) -> dict[str, Any]:
        """Progress and raw thresholds, for `load_state_dict`; solves first unless inside `exact()`."""
        if self._training is None:
            self.solve()
        raws = self._raws if self._training is None else self._training
        return {
            "progress": self.progress,
            "steps": self.steps,
            "raw_thresholds": [raw.detach().clone() for raw in raws],
            "held_back": [held.clone() for held in self._held_back],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; load the model's own state before. ValueError if it is of another model."""
        raws = state["raw_thresholds"]
        shapes, own = [tuple(raw.shape) for raw in raws], [tuple(raw.shape) for raw in self._raws]
        if shapes != own:
            raise ValueError(f"the state holds raw thresholds of shapes {shapes}, the model has {own}")
        self.progress, self.steps = state["progress"], state["steps"]
        for raw, before, value in zip(self._raws, self._before, raws, strict=True):
            raw.copy_(value)
            before.copy_(value)
        self._held_back = [held.to(raw) for held, raw in zip(state["held_back"], self._raws, strict=True)]

    def _budget_now(self) -> Tensor:
        """What the thresholded weights may cost now; int64 on their device."""
        if self.begin <= self.progress < self.end:
            done = SCHEDULES[self.schedule]((self.progress - self.begin) / (self.end - self.begin))
        else:
            done = float(self.progress >= self.end)
        keep = torch.full((), self._dense - round(done * (self._dense - self._keep)), device=self._raws[0].device)
        if self.target.flops is None and done == 1:  # Zeros in layers without a threshold count towards the target.
            for module, attribute in self._others:
                weight = getattr(module, attribute)
                keep += weight.numel() - weight.count_nonzero()
        return keep


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
            layers.append(_Layer(module, 1 if target.flops is None else flops, flops))
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
