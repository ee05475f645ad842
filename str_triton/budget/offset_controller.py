"""The base class of all controllers: one offset common to all raw thresholds moves a model's cost along a schedule.

The thresholds relative to each other are the *distribution*; the offset is the *amount*. Each kind of controller
defines the offset in `_cut`, and how far it may move a threshold.
"""

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from str_triton.budget.processes import Processes
from str_triton.budget.raw_thresholds import RawThresholds
from str_triton.budget.target import SCHEDULES
from str_triton.nn import Control, ThresholdHolder

FREEZE = 0.35  # share of training after which a learned distribution stays


class OffsetController:
    """Solves for the offset, steps, gives exact models for evaluation, and resumes.

    Raises:
        ValueError: options that are unknown or out of range, or a model without values, on the meta device.
    """

    DISTRIBUTIONS: tuple[str, ...] = ("fixed", "learned")
    _others_then: Any  # what `_counted` returned when the controller was made

    def __init__(
        self, model: nn.Module, *, schedule: str, begin: float, end: float, distribution: str, interval: int
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
        if not 0 <= begin <= end <= 1:
            raise ValueError(f"begin and end must be 0 <= begin <= end <= 1, got {begin} and {end}")
        if distribution not in self.DISTRIBUTIONS:
            names = ", ".join(map(repr, self.DISTRIBUTIONS))
            raise ValueError(f"distribution must be one of {names}, got {distribution!r}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        if empty := next((name for name, parameter in model.named_parameters() if parameter.is_meta), None):
            raise ValueError(
                f"parameter {empty!r} is on the meta device and has no values: first model.to_empty(device=...) and "
                "load or initialize the weights, then make the controller"
            )
        self.schedule, self.begin, self.end = schedule, begin, end
        self.distribution = distribution
        self.interval = interval
        self.progress, self.steps = 0.0, 0
        # Inside exact(): this process's raw thresholds and `_held_back`, to restore on leaving.
        self._training: tuple[list[Tensor], list[Tensor]] | None = None

    def _take(self, model: nn.Module, holders: Iterable[ThresholdHolder], modules: Iterable[ThresholdHolder]) -> None:
        """Hold the raw thresholds of some modules, each once, and mark all the modules that use them."""
        modules = list(modules)
        if any(module.control is not None and module.control.is_held for module in modules):
            raise ValueError(
                "the model has a controller already: use that one, or delete it (del controller) before making another"
            )
        self._thresholds = RawThresholds(model, holders, self._weights())
        self._held_back = [raw.new_zeros(()) for raw in self._thresholds.before]
        self._modules = modules
        self._let_learn(self.distribution == "learned")
        self._control = Control(owner=weakref.ref(self), status="no step was made")
        for module in modules:
            module.control = self._control

    @property
    def _raws(self) -> list[nn.Parameter]:
        return self._thresholds.parameters

    @property
    def _processes(self) -> Processes:
        return self._thresholds.processes

    def _weights(self) -> list[Tensor]:
        """Return the Parameters behind the thresholds."""
        raise NotImplementedError

    def _meet(self) -> None:
        """Take the parameters as they are now: whole, or the shards that `fully_shard` has made of them."""
        self._thresholds.meet(self._weights())
        self._held_back = [held.to(raw) for held, raw in zip(self._held_back, self._thresholds.before, strict=True)]

    def _let_learn(self, learn: bool) -> None:
        """Let the forward give the raw thresholds gradients, or not.

        `requires_grad` stays as it is: DistributedDataParallel may have wrapped the model already, and would wait for
        the gradient.
        """
        for module in self._modules:
            module.learns_threshold = learn
            if learn:
                module.raw().requires_grad_(True)

    def _cut(self, done: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the two offsets to cut between, and for each raw threshold the largest offset that it may take.

        (below, above): elements with offsets up to `below` are cut, elements from `above` on are kept; `below` is -inf
        if nothing needs to be cut. The values are scalars on the device of the raw thresholds, or [raw thresholds]
        if each has an offset of its own. Offsets are measured from the raw threshold that nothing has held back
        (`_held_back`).
        """
        raise NotImplementedError

    def step(self, progress: float) -> None:
        """Follow the schedule; call it after `optimizer.step()`.

        Args:
            progress: the share of training that is done, 0 to 1. At 1 the target is met, as by `finish()`.

        Raises:
            ValueError: progress out of range, smaller than at the step before, inside `exact()` or after `densify`.
        """
        self._refuse("step")
        progress = float(progress)  # also of a tensor or of numpy's numbers
        self._advance(progress)
        self._meet()
        if self.distribution == "learned":
            self._temper()
        else:
            self._thresholds.hold()
        if progress == 1:
            self.finish()
        else:
            self._follow()
        self.steps += 1

    def _follow(self) -> None:
        """Solve at every interval, before the end of training."""
        if self.steps % self.interval == 0:
            self.solve()

    def _advance(self, progress: float) -> None:
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        if progress < self.progress:
            raise ValueError(
                f"progress must not go backwards, got {progress} after {self.progress}: "
                "begin another training with a new controller"
            )
        self.progress = progress
        self._control.reached = False
        self._control.status = f"progress {progress:.4g} of 1"

    @torch.no_grad()
    def solve(self) -> None:
        """Move all raw thresholds by one offset so that the model costs what the schedule says now."""
        self._meet()
        shifts, self._held_back = self._shifts(self._done())
        self._thresholds.move(shifts)

    def finish(self, model: nn.Module | None = None) -> None:
        """Make the model meet the target now, exactly and for good.

        `step(1.0)` does the same. If an optimizer continues afterwards, the model drifts from the target.

        Args:
            model: another model of the same structure, such as an average of weights
                (`torch.optim.swa_utils.AveragedModel`), which meets the target by its own weights; None: the
                controller's own.

        Raises:
            ValueError: a weight is NaN, `model` has other thresholded weights, or the controller's own model is inside
                `exact()`.
        """
        controller = self if model is None else self._for(model)
        if controller._control is self._control:
            self._refuse("finish")
        controller._check_unchanged()
        controller.progress = 1.0
        controller._meet()
        controller._adopt(self._thresholds)
        controller._make_exact(done=1.0)
        controller._control.reach()

    def _refuse(self, method: str) -> None:
        """Raise ValueError after `densify`, and inside `exact()`, which would undo the method's changes."""
        if self._control.densified:
            raise ValueError(f"{method}() after densify(model): the model has no thresholds any more")
        if self._training is not None:
            raise ValueError(f"{method}() inside exact() would be undone on leaving it: call {method}() afterwards")

    def _check_unchanged(self) -> None:
        """Raise ValueError if the model has lost controlled layers; warn, once, if other weights came or went."""
        self._thresholds.require_present()
        now = self._counted(self._thresholds.model)
        if now != self._others_then:
            self._others_then = now
            warnings.warn(
                "weights were added to the model, removed or tied otherwise since the controller was made: the target "
                "holds for the weights that were there then; to count the present ones, make a new controller",
                stacklevel=4,
            )

    def _counted(self, model: nn.Module) -> Any:
        """Return what the target counts in a model whatever the thresholds are, in a form that can be compared."""
        raise NotImplementedError

    def still_meets(self) -> bool:
        """Check whether the model costs no more than the target, as it is now. Synchronizes with the GPU.

        Models that are spread over processes, or have no values, are not checked.
        """
        self._meet()
        if self._processes.group is not None or any(raw.is_meta for raw in self._raws):
            return True
        return self._is_within()

    def _is_within(self) -> bool:
        """Check whether the model costs no more than the target."""
        raise NotImplementedError

    def _make_exact(self, done: float) -> None:
        """Make the model's cost exact: move raw thresholds, and weights if needed."""
        shifts, self._held_back = self._shifts(done)
        with torch.no_grad():
            self._thresholds.move(shifts)

    def _undo_exact(self) -> None:
        """Undo the changes of `_make_exact` other than those of raw thresholds."""

    def _for(self, model: nn.Module) -> Self:
        """Return a controller like this one for another model of the same structure."""
        if self._control.densified:
            raise ValueError("the controller's own model was densified and has no thresholds to give to another one")
        self._meet()
        twin = copy.copy(self)
        twin._training = None
        holders = twin._bind(model)
        twin._control = next((holder.control for holder in holders if holder.control is not None), Control())
        twin._thresholds = RawThresholds(model, holders, twin._weights())
        return twin

    def _bind(self, model: nn.Module) -> Sequence[ThresholdHolder]:
        """Take the weights of another model in place of the present ones; return the holders of their thresholds.

        Raises ValueError if the other model has no weight of the same name and shape.
        """
        raise NotImplementedError

    def _adopt(self, thresholds: RawThresholds) -> None:
        """Use the thresholds of the trained model: an average of thresholds during training meets no target."""
        if thresholds is not self._thresholds:
            self._thresholds.load(thresholds.whole())

    def _shifts(self, done: float) -> tuple[list[Tensor], list[Tensor]]:
        """Return how far to move each raw threshold, and how far its floor then keeps it below the offset."""
        below, above, caps = self._cut(done)
        # Halfway, so that rounding cannot move a weight across. If nothing is to be cut, or kept, it is one step away.
        offset = torch.where(below.isinf(), above - 1, torch.where(above.isinf(), below + 1, (below + above) / 2))
        offset = offset.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        offsets = offset.expand(len(caps)).unbind()
        held = [(own - cap).clamp(min=0) for own, cap in zip(offsets, caps, strict=True)]
        shifts = [own - now + before for own, now, before in zip(offsets, held, self._held_back, strict=True)]
        return shifts, held

    def _temper(self) -> None:
        """Limit the optimizer's change of the raw thresholds."""
        self._thresholds.temper(frozen=self.progress > FREEZE)

    @contextmanager
    def exact(self, model: nn.Module | None = None) -> Iterator[None]:
        """Make the model cost exactly what the schedule says; on leaving, training continues unchanged.

        Evaluate and write checkpoints inside the block. There a state dict of the model holds the exact thresholds, and
        a state dict of the controller holds the values from which training continues.

        Args:
            model: another model of the same structure, such as an average of weights; None: the controller's own.

        Raises:
            ValueError: a weight is NaN, or `model` has other thresholded weights.
        """
        controller = self if model is None else self._for(model)
        if controller._training is not None:
            yield
            return
        if controller._control is self._control:
            self._refuse("exact")
        controller._check_unchanged()
        controller._meet()
        held_back, saved = controller._held_back, controller._thresholds.save()
        controller._training = saved[0], held_back
        try:
            controller._adopt(self._thresholds)
            controller._make_exact(self._done())
            controller._control.exact = True
            yield
        finally:
            controller._meet()
            controller._undo_exact()
            controller._thresholds.restore(saved)
            controller._held_back, controller._training = held_back, None
            controller._control.exact = False

    def measure(self) -> dict[str, float]:
        """Return the model's present cost by name, for a log: {"sparsity": ...} or {"total_rank": ...}.

        Between solves the cost is near the schedule's value; inside `exact()` it is equal. Synchronizes with the GPU.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return progress and raw thresholds, for `load_state_dict`; solves first unless inside `exact()`."""
        self._meet()
        if self._training is None:
            self.solve()
        raws, held_back = (None, self._held_back) if self._training is None else self._training
        return {
            "progress": self.progress,
            "steps": self.steps,
            "reached": self._control.reached,
            "raw_thresholds": self._thresholds.whole(raws),
            "held_back": [held.clone() for held in held_back],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Load the model's own state before. Another model's state is a ValueError."""
        self._meet()
        raws = state["raw_thresholds"]
        shapes, own = [tuple(raw.shape) for raw in raws], [tuple(raw.shape) for raw in self._raws]
        if shapes != own:
            raise ValueError(f"the state holds raw thresholds of shapes {shapes}, the model has {own}")
        self.progress, self.steps = state["progress"], state["steps"]
        self._thresholds.load(raws)
        self._held_back = [held.to(raw) for held, raw in zip(state["held_back"], self._thresholds.own, strict=True)]
        self._control.reached = state["reached"]
        self._control.status = f"progress {self.progress:.4g} of 1"

    def _done(self, progress: float | None = None) -> float:
        """Return the schedule's share of the way to the target, 0 to 1, at this progress (None: now)."""
        progress = self.progress if progress is None else progress
        if self.begin <= progress < self.end:
            return SCHEDULES[self.schedule]((progress - self.begin) / (self.end - self.begin))
        return float(progress >= self.end)
