"""Meets a named budget exactly: one offset common to all raw thresholds moves the total along a schedule.

The layers' thresholds relative to each other are the *distribution*; the offset is the *amount*. A weight w with the
raw threshold r is pruned from the offset g^-1(|w|) - r on. So the offset for a given number of survivors (or their cost
in FLOPs) is the k-th of these values. `allocate` finds it on the host and tells equal values apart. `select` finds it
on a GPU without waiting for the device. If the target names each layer's share, every layer has an offset of its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.budget import inventory
from str_triton.budget.allocate import NotANumberError
from str_triton.budget.cuts import common_cut, diverged, exact_cut, separate_cuts
from str_triton.budget.names import unwrapped_names
from str_triton.budget.offset_controller import OffsetController
from str_triton.budget.processes import nonzeros
from str_triton.budget.raw_thresholds import raws_for_rows
from str_triton.budget.survivors import Moved
from str_triton.budget.target import LayersTarget, Target
from str_triton.budget.target_kinds import require_kind
from str_triton.nn import ThresholdHolder, require_own_weights, thresholded_weights

FLOP_EXPONENT = 0.2  # More costs accuracy (docs/exact-budgets.md).


class SparsityController(OffsetController):
    """A controller that moves the thresholds of a sparsified model to an exact budget.

        controller = SparsityController(model, Target(sparsity=0.9))
        for i in range(steps):
            ...                             # forward, backward
            optimizer.step()
            controller.step((i + 1) / steps)

    Every `interval` steps the controller computes (solves for) the thresholds that the schedule will ask for at the
    next solve. On a GPU this needs no host synchronization. Between solves the thresholds move to these values in equal
    steps, and the number of survivors differs a little from the schedule. Evaluate and write checkpoints inside
    `with controller.exact()`, where the count is exact. It is also exact after `finish()` or `step(1.0)`.

    The count is exact for every dtype, also if many weights are equal. If no threshold can tell weights apart, the
    first ones survive, in the order of the model's layers and of a weight's elements. The others get the magnitude of
    the threshold, so that they are pruned; `exact()` restores them when it ends.

    Args:
        model: a sparsified model.
        target: the budget. Sparsity is met to within one weight, FLOPs to within one weight's FLOPs. If the target
            names a layer's share, round(share * weights) of its weights are zero at the end. Weights that are zero
            already stay zero.
        schedule: "cubic" (fast first, as in magnitude pruning), "linear" or "constant" from progress `begin` to `end`;
            before, all weights survive, and after, the target holds.
        example_input: for a target in FLOPs, as in `count`.
        distribution: "fixed": the thresholds keep their present ratios (g = "exp") and need no gradients. After
            `sparsify` they are equal. "flop-aware": the same, after a first step that makes each threshold
            larger in proportion to (FLOPs per weight of example_input) ** 0.2. "learned": the optimizer moves them,
            slowly and within bounds, in the first third of training.
        floor: the least that a layer keeps, so that no layer is emptied, as a share of the survivors that it would have
            if all layers were pruned alike. A layer always keeps at least one weight, and the floor asks for at most
            one weight per filter. 0: no floor. A target that names each layer's share has no floor either.
        interval: steps between solves.
        straight_through_until: progress until which layers with the straight-through gradient use it, so that pruned
            weights can come back; after it they use the masked gradient. 1: throughout, which is better at 90 % zeros
            in training from scratch, and collapses at 98 % zeros and more in fine-tuning (docs/methods.md).

    Raises:
        ValueError: a model without thresholds or with another controller, a target that cannot be met because of
            excluded layers, a target that names other layers than the thresholded ones, a target in FLOPs without
            example_input, or arguments out of range.

    Warns:
        UserWarning: more than 1 % of the weights are of kinds that `sparsify` does not cover and are not excluded, or
            more weights are zero already than the target asks for.
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
        require_kind(target, Target)
        super().__init__(model, schedule=schedule, begin=begin, end=end, distribution=distribution, interval=interval)
        if not 0 <= straight_through_until <= 1:
            raise ValueError(f"straight_through_until must be in [0, 1], got {straight_through_until}")
        self.straight_through_until = straight_through_until
        self.target = target
        self._shares: Mapping[str, float] = target.layers if isinstance(target, LayersTarget) else {}
        self._layers, self._others, costs = inventory.take_inventory(
            model, target, example_input, count_flops=target.counts_flops or distribution == "flop-aware"
        )
        self._dense = costs.thresholded
        self._whole = costs.flops if target.counts_flops else costs.thresholded + costs.others
        if floor or distribution == "flop-aware" or target.by_layer:
            inventory.require_own_thresholds(self._layers)
        if target.by_layer:
            inventory.check_shares(self._layers, self._shares, distribution)
            keep = self._keep_each(1.0)
        else:
            self._keep = min(target.keep(costs), self._dense)
            inventory.set_floors(self._layers, floor, self._keep, target)
            keep = [int(self._budget(1.0))]
        inventory.warn_of_zeros(self._layers, keep)
        self._others_then = self._counted(model)
        uses = list(thresholded_weights(model))
        self._straight_through = [use.holder for use in uses if use.holder.gradient == "straight_through"]
        self._take(model, [layer.weight.holder for layer in self._layers], [use.holder for use in uses])
        if distribution == "flop-aware":
            for layer in self._layers:
                layer.weight.holder.scale_threshold(max(layer.flops, 1) ** FLOP_EXPONENT)
        self._thresholds.before = [raw.clone() for raw in self._thresholds.own]
        # The changes per step, until the next solve, of the raw thresholds and of `_held_back`.
        self._drift: tuple[list[Tensor], list[Tensor]] | None = None
        self._marks: list[tuple[float, int]] = []  # (progress, step) at the start of training, and at the last `_aim`.
        self._moved = Moved([layer.weight for layer in self._layers])  # The values that exact() restores.
        self._set_gradient()

    def _advance(self, progress: float) -> None:
        super()._advance(progress)
        self._set_gradient()

    def _set_gradient(self) -> None:
        gradient = "straight_through" if self.progress < self.straight_through_until else "masked"
        for module in self._straight_through:
            if module.gradient != gradient:  # at every step: nn.Module's assignment is slow
                module.gradient = gradient

    @torch.no_grad()
    def _follow(self) -> None:
        if self.steps == 0:
            super().solve()
            self._marks = [(0.0, -1) if self.progress * self.interval <= 1 else (self.progress, 0)]
        elif self._drift is not None:
            self._thresholds.move(self._drift[0])
            torch._foreach_add_(self._held_back, self._drift[1])
        if self.steps % self.interval == 0 or self._drift is None:
            self._aim(self.steps)

    def _aim(self, step: int) -> None:
        """Solve for the thresholds at the next planned solve, and divide the change among the steps until then.

        The progress at that solve is predicted from the pace since training began and the pace since the last `_aim`.
        The slower one counts, because progress may stand still for an epoch and then jump.
        """
        paces = [(self.progress - progress) / (step - before) for progress, before in self._marks if before < step]
        if not paces:
            return  # The first step of a training that began before the controller.
        left = self.interval - step % self.interval
        ahead = min(self.progress + min(paces) * left, 1.0)
        shifts, held = self._shifts(self._done(ahead))
        more = [after - now for after, now in zip(held, self._held_back, strict=True)]
        self._drift = [shift / left for shift in shifts], [change / left for change in more]
        self._marks = [self._marks[0], (self.progress, step)]

    @torch.no_grad()
    def solve(self) -> None:
        super().solve()
        if self._drift is not None and self._training is None:
            self._aim(self.steps - 1)  # The remaining change begins from here.

    def _shifts(self, done: float) -> tuple[list[Tensor], list[Tensor]]:
        if self._raws[0].device.type != "cpu" and self._processes.group is None:
            return super()._shifts(done)
        try:
            return self._allocated(done)[:2]
        except NotANumberError:  # `_make_exact` reports it. Until then the thresholds stay as they are.
            return [torch.zeros_like(held) for held in self._held_back], self._held_back

    def _allocated(self, done: float) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Return how far to move each raw threshold, how far it is then held back, and how much each layer keeps."""
        before = {id(raw): held for raw, held in zip(self._raws, self._held_back, strict=True)}
        middle = float(self._thresholds.mean())
        raws = raws_for_rows([layer.weight for layer in self._layers], self._processes)
        references = [  # near 0, where float32 is precise
            raw + before[id(layer.raw)] - middle for layer, raw in zip(self._layers, raws, strict=True)
        ]
        keep = self._keep_each(done) if self.target.by_layer else int(self._budget(done))
        kept, own = exact_cut(self._layers, references, keep, self._processes)
        shifts, held = [], []
        for raw, now in zip(self._raws, self._held_back, strict=True):
            common, offset = own[id(raw)]
            held.append(torch.full_like(now, common - offset))
            shifts.append(now + (offset - middle))
        return shifts, held, kept

    def _make_exact(self, done: float) -> None:
        try:
            shifts, self._held_back, kept = self._allocated(done)
        except NotANumberError as error:
            raise diverged(self._layers, error) from None
        with torch.no_grad():
            self._thresholds.move(shifts)
        self._moved.keep_exactly(kept, self._processes)
        if self._training is None:
            self._drift = None

    def _undo_exact(self) -> None:
        self._moved.put_back()

    def _check_unchanged(self) -> None:
        super()._check_unchanged()
        require_own_weights(layer.weight for layer in self._layers)
        self._others = inventory.present(self._thresholds.model, self._others)

    def _counted(self, model: nn.Module) -> list[tuple[int, ...]]:
        return inventory.covered_shapes(model)

    def _is_within(self) -> bool:
        if self._thresholds.lost or self._counted(self._thresholds.model) != self._others_then:
            return False
        left = inventory.survivors(self._layers).tolist()
        if self.target.by_layer:
            return all(number <= keep for number, keep in zip(left, self._keep_each(1.0), strict=True))
        return sum(layer.cost * number for layer, number in zip(self._layers, left, strict=True)) <= self._budget(1.0)

    def finish(self, model: nn.Module | None = None) -> None:
        super().finish(model)
        if model is None:
            self._moved = Moved(self._moved.weights)  # for good
            self._set_gradient()

    def _bind(self, model: nn.Module) -> list[ThresholdHolder]:
        uses = unwrapped_names({use.name: use for use in thresholded_weights(model)})
        for layer in self._layers:
            use = uses.get(layer.name)
            if use is None or use.dense.shape != layer.weight.dense.shape or use.raw.shape != layer.raw.shape:
                raise ValueError(
                    f"the model has no thresholded weight {layer.name!r} of shape {list(layer.weight.dense.shape)}: "
                    "give a copy or an average of the controller's own model"
                )
        self._layers = [replace(layer, weight=uses[layer.name]) for layer in self._layers]
        self._others = inventory.present(model, self._others)
        self._moved = Moved([layer.weight for layer in self._layers])
        return [layer.weight.holder for layer in self._layers]

    def _weights(self) -> list[Tensor]:
        return [layer.weight.dense for layer in self._layers]

    def _cut(self, done: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        if self.target.by_layer:
            return separate_cuts(self._layers, self._keep_each(done))
        held_back = {id(raw): held for raw, held in zip(self._raws, self._held_back, strict=True)}
        below, above, caps = common_cut(self._layers, held_back, self._budget(done))
        return below, above, [caps[id(raw)] for raw in self._raws]

    def _zeros(self, done: float) -> list[int]:
        """Return how many elements of each layer are zero if the target names its share."""
        return [round(done * round(self._shares[layer.name] * layer.size)) for layer in self._layers]

    def _keep_each(self, done: float) -> list[int]:
        """Return how many elements of each layer survive if the target names its share."""
        return [layer.size - zeros for layer, zeros in zip(self._layers, self._zeros(done), strict=True)]

    def _budget(self, done: float) -> int | Tensor:
        """Return the budget of the thresholded weights at this point of the schedule, as int64 on the device.

        At the end zeros in weights without a threshold count towards the target.
        """
        keep: int | Tensor = self._dense - round(done * (self._dense - self._keep))
        if done == 1 and not self.target.counts_flops:
            others = [other.value.detach() for other in self._others]
            if others:
                keep = keep + sum(other.numel() for other in others) - nonzeros(others).sum()
        return keep

    def scheduled(self) -> dict[str, float]:
        """Return the schedule's present value, for a progress line. No weight is read.

        {"sparsity": share of all covered weights} or {"flops_share": share of the dense model's multiply-adds}.
        """
        done = self._done()
        if self.target.by_layer:
            cut = sum(self._zeros(done))
        else:
            cut = round(done * (self._dense - self._keep))
        return {"flops_share": 1 - cut / self._whole} if self.target.counts_flops else {"sparsity": cut / self._whole}

    def measure(self) -> dict[str, float]:
        return {"sparsity": inventory.present_sparsity(self._layers, self._others)}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        drift = None if self._drift is None else [[part.clone() for part in parts] for parts in self._drift]
        return state | {
            "layers": dict(self._shares) if self.target.by_layer else None,
            "drift": drift,
            "marks": list(self._marks),
            "changed": self._moved.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("layers") != (self._shares if self.target.by_layer else None):
            raise ValueError("the state was made for another target by layers; has the file that names it changed?")
        super().load_state_dict(state)
        device = self._thresholds.own[0].device
        drift, self._marks = state["drift"], state["marks"]
        if drift is not None:
            shifts, more = drift
            drift = [shift.to(device) for shift in shifts], [change.to(device) for change in more]
        self._drift = drift
        self._moved.load(state["changed"])
        self._set_gradient()
