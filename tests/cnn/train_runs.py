"""What the tests of the training program share: a tiny run, and how to look at what it left."""

from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from cnn import train

TINY = ["--epochs", "2", "--batch-size", "256", "--checkpoint-steps", "2", "--device", "cpu"]  # 2 x 5 steps


def begin(folder: Path, *options: str) -> int:
    """A tiny run in ``folder``; its exit code."""
    return run(*TINY, *options, "--run-dir", str(folder))


def last_checkpoint(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints").glob("*.pt")), weights_only=True)


def resume(folder: Path, *options: str) -> int:
    return run(*options, "--resume", "--run-dir", str(folder))


def run(*args: str) -> int:
    """The program's exit code, as from a process of its own: what it sets for its whole process is undone."""
    threads = torch.get_num_threads()
    try:
        return train.main(args)
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
