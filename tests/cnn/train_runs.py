"""Helpers of the tests of the training program: a tiny run, and readers of what it left."""

from pathlib import Path

from torch import nn

from str_triton.cnn import train
from tests.runs import run_main

TINY = ["--epochs", "2", "--batch-size", "256", "--checkpoint-steps", "2", "--device", "cpu"]  # 2 x 5 steps


def two_layers(num_classes: int, in_channels: int) -> nn.Module:
    """Return a network with a batch norm for images of 8x8 pixels. A tenth of its weights is a whole number."""
    convolution, linear = nn.Conv2d(in_channels, 10, 3, bias=False), nn.Linear(360, num_classes)
    return nn.Sequential(convolution, nn.BatchNorm2d(10), nn.Flatten(), linear)


def begin(folder: Path, *options: str) -> int:
    """Start a tiny run in ``folder`` and return its exit code."""
    return run(*TINY, *options, "--run-dir", str(folder))


def resume(folder: Path, *options: str) -> int:
    return run(*options, "--resume", "--run-dir", str(folder))


def run(*args: str) -> int:
    return run_main(train.main, list(args))
