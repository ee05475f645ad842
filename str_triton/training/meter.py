"""Mean loss and accuracy, summed on the device so that a training step waits for nothing; and examples per second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Means(NamedTuple):
    """Means over the examples seen, by all processes."""

    loss: float
    accuracy: float


class Meter:
    """Sums of loss, correct answers and examples. `totals` is a float64 tensor of these three, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean ``loss``, its ``outputs`` [B, classes] and its ``labels`` [B]."""
        correct = (outputs.detach().argmax(1) == labels).sum()
        examples = torch.full_like(correct, len(labels))
        self.totals += torch.stack((loss.detach().double() * len(labels), correct.double(), examples.double()))

    def reset(self) -> None:
        """Start again from nothing."""
        self.totals.zero_()

    def means(self) -> Means:
        """This process's means so far. Waits for the device."""
        return _means(self.totals)

    def reduced(self, accelerator: Accelerator) -> Tensor:
        """The totals of all processes together. A meeting point of the processes."""
        return accelerator.reduce(self.totals, "sum")

    def all_means(self, accelerator: Accelerator) -> Means:
        """The means over all processes. A meeting point of the processes; waits for the device."""
        return _means(self.reduced(accelerator))


class Throughput:
    """Examples per second of training. What a clock of the wall says: wait for the device before asking."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from nothing."""
        self._examples, self._paused, self._began = 0, 0.0, time.monotonic()

    def add(self, examples: int) -> None:
        """Count so many more."""
        self._examples += examples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that the block takes is not training's."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def per_second(self) -> float:
        """Examples per second since `reset`."""
        return self._examples / max(time.monotonic() - self._began - self._paused, 1e-9)


def _means(totals: Tensor) -> Means:
    loss, correct, examples = totals.tolist()
    return Means(loss / max(examples, 1.0), correct / max(examples, 1.0))
