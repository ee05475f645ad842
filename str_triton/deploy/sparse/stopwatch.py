"""Timing of candidates in turns, for machines that also run other programs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

Calls = Mapping[Any, Callable[[], object]]
ROUNDS = 3  # in each round every candidate is timed once, so that a disturbance affects all of them
MOST_ROUNDS, LIMIT = 16, 1.0  # rounds and seconds, where other programs use the processor
ALIKE = 1.1
EVICTED = 16 * 2**20  # bytes that fill the caches of several cores
HOPELESS = 2.5  # a candidate that takes this many times as long as the fastest is not timed again
RESTLESS = 1.6  # the machine is busy if the median call takes this many times as long as the fastest


@dataclass
class Stopwatch:
    """Times calls in turns, and notices whether the machine is quiet."""

    _scratch: Tensor = field(default_factory=lambda: torch.zeros(EVICTED // 4, dtype=torch.float32, device="cpu"))
    _spreads: list[float] = field(default_factory=list)

    @property
    def is_quiet(self) -> bool:
        return not self._spreads or median(self._spreads) < RESTLESS

    def race(
        self, calls: Calls, rounds: int | None = None, *, cold: bool = True, limit: float = LIMIT
    ) -> dict[Any, float]:
        """Return the fewest milliseconds of each call over at least `rounds` rounds, after one call to warm up.

        Args:
            calls: what to time, by name.
            rounds: the number of rounds on a quiet machine; default ROUNDS.
            limit: seconds after which no further rounds are added.
            cold: empty the caches before each call, as the other layers of a network do.
        """
        rounds = ROUNDS if rounds is None else rounds
        seconds: dict[Any, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        running, begin = dict(calls), time.perf_counter()
        for count in range(1, MOST_ROUNDS + 1):
            for name, call in running.items():
                if cold:
                    self._scratch += 1
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
            if count < rounds:
                continue
            fastest = min(map(min, seconds.values()))
            running = {name: call for name, call in running.items() if min(seconds[name]) < HOPELESS * fastest}
            if all(_is_confirmed(seconds[name]) for name in running) or time.perf_counter() - begin > limit:
                break
        if rounds > 1:
            self._spreads += [median(values) / min(values) for values in seconds.values()]
        return {name: 1e3 * min(values) for name, values in seconds.items()}


def _is_confirmed(seconds: list[float]) -> bool:
    """Check that the second fastest call took about as long as the fastest, so that the minimum is reliable."""
    least, *rest = sorted(seconds)
    return not rest or rest[0] < ALIKE * least
