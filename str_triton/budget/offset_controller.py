"""What all controllers share: one offset common to all raw thresholds moves a model's cost along a schedule.

The thresholds relative to each other are the *distribution*; the offset is the *amount*. What the offset must be, and
how far it may move a threshold, is for the kind of controller to say (`_cut`).
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from str_triton.budget.target import SCHEDULES
from str_triton.nn import Control

# What the optimizer may do to learned thresholds: steps at full length kill a layer (docs/exact-budgets.md).
LEARNING_RATE = 0.1  # of its steps' length
BOUND = 0.5  # largest distance of a raw threshold from the mean
FREEZE = 0.35  # share of training after which the distribution stays


class OffsetController:
    """Solves for the offset, steps, gives exact models for evaluation, and resumes.

    Raises:
        ValueError: options that are unknown or out of range.
    """

    DISTRIBUTIONS: tuple[str, ...] = ("fixed", "learned")

    def __init__(self, *, schedule: str, begin: float, end: float, distribution: str, interval: int) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
        if not 0 <= begin <= end <= 1:
            raise ValueError(f"begin and end must be 0 <= begin <= end <= 1, got {begin} and {end}")
        if distribution not in self.DISTRIBUTIONS:
            names = ", ".join(map(repr, self.DISTRIBUTIONS))
            raise ValueError(f"distribution must be one of {names}, got {distribution!r}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.schedule, self.begin, self.end = schedule, begin, end
        self.distribution = distribution
        self.interval = interval
        self.progress, self.steps = 0.0, 0
        self._training: list[Tensor] | None = None  # The raw thresholds to come back to, inside exact().

    def _take(self, raws: Iterable[nn.Parameter], modules: Iterable[nn.Module]) -> None:
        """Hold these raw thresholds, each once, and tell the modules that theirs are held."""
        self._raws = list({id(raw): raw for raw in raws}.values())
        self._before = [raw.detach().clone() for raw in self._raws]  # What the optimizer's step begins with.
        self._held_back = [raw.new_zeros(()) for raw in self._before]
        for raw in self._raws:
            raw.requires_grad_(self.distribution == "learned")
        self._control = Control(owner=weakref.ref(self))
        for module in modules:
            module.control = self._control

    def _cut(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Between which two offsets to cut, and for each raw threshold the largest one that it may take.

        Scalars on the device of the raw thresholds, or a value for each, where each has an offset of its own: [raw
        thresholds]. Offsets count from where a raw threshold would be if nothing had
        held it back (`_held_back`). (below, above): what has an offset up to `below` is cut, from `above` on kept;
        -inf for `below` where nothing need be cut.
        """
        raise NotImplementedError

    def step(self, progress: float) -> None:
        """Call after `optimizer.step()`, with the share of training that is done, 0 to 1; at 1 the target is met."""
        self._advance(progress)
        if self.distribution == "learned":
            self._temper()
        if self.steps % self.interval == 0 or progress == 1:
            self.solve()
        self.steps += 1

    def _advance(self, progress: float) -> None:
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        self.progress = progress

    @torch.no_grad()
    def solve(self) -> None:
        """Move all raw thresholds by one offset so that the model costs what the schedule says now."""
        shifts, self._held_back = self._shifts()
        for raw, before, shift in zip(self._raws, self._before, shifts, strict=True):
            raw.add_(shift)
            before.add_(shift)

    def _shifts(self) -> tuple[list[Tensor], list[Tensor]]:
        """By how much to move each raw threshold, and how far its floor then holds it back from the common offset."""
        below, above, caps = self._cut()
        # Halfway, where rounding cannot move a weight across; nothing to cut, or nothing to keep, is one step away.
        offset = torch.where(below.isinf(), above - 1, torch.where(above.isinf(), below + 1, (below + above) / 2))
        offset = offset.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        offsets = offset.expand(len(caps)).unbind()
        held = [(own - cap).clamp(min=0) for own, cap in zip(offsets, caps, strict=True)]
        shifts = [own - now + before for own, now, before in zip(offsets, held, self._held_back, strict=True)]
        return shifts, held

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

    def _done(self) -> float:
        """How much of the way to the target the schedule has gone, 0 to 1."""
        if self.begin <= self.progress < self.end:
            return SCHEDULES[self.schedule]((self.progress - self.begin) / (self.end - self.begin))
        return float(self.progress >= self.end)
