"""Measurement of mean loss and accuracy, summed on the device without synchronizing, and of training throughput."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Means(NamedTuple):
    """Means over examples."""

    loss: float
    accuracy: float


class Meter:
    """Sums of losses, of correct answers, and of examples. `totals` holds the three as float64, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch, with its mean ``loss``, its ``outputs`` [B, classes] and its ``labels`` [B]."""
        correct = (outputs.detach().argmax(1) == labels).sum()
        examples = torch.full_like(correct, len(labels))
        self.totals += torch.stack((loss.detach().double() * len(labels), correct.double(), examples.double()))

    def reset(self) -> None:
        """Set the sums to zero."""
        self.totals.zero_()

    def means(self) -> Means:
        """Return this process's means so far. Synchronizes with the device."""
        return _means(self.totals)

    def reduced(self, accelerator: Accelerator) -> Tensor:
        """Return the sums over all processes. Call it in all of them."""
        return accelerator.reduce(self.totals, "sum")

    def all_means(self, accelerator: Accelerator) -> Means:
        """Return the means over all processes. Call it in all of them. Synchronizes with the device."""
        return _means(self.reduced(accelerator))


class Throughput:
    """Training throughput in examples per second of wall-clock time. Synchronize the device before reading it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new measurement."""
        self._examples, self._paused, self._began = 0, 0.0, time.monotonic()

    def add(self, examples: int) -> None:
        """Count examples."""
        self._examples += examples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def per_second(self) -> float:
        """Return the examples per second since `reset`."""
        return self._examples / max(time.monotonic() - self._began - self._paused, 1e-9)


def _means(totals: Tensor) -> Means:
    loss, correct, examples = totals.tolist()
    return Means(loss / max(examples, 1.0), correct / max(examples, 1.0))
