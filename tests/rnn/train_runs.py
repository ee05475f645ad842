"""Helpers of the training program's tests: tiny runs."""

from pathlib import Path

from str_triton.rnn import train
from tests.runs import run_main

# 2 epochs of 5 steps.
TINY = ["--epochs", "2", "--batch-size", "54", "--hidden-size", "8", "--checkpoint-steps", "2", "--device", "cpu"]
RANK = ["--target-rank", "10"]  # the full ranks are 2 x (12 + 8)


def begin(folder: Path, *options: str) -> int:
    """Start a tiny run in ``folder`` and return its exit code."""
    return run(*TINY, *options, "--run-dir", str(folder))


def resume(folder: Path, *options: str) -> int:
    return run(*options, "--resume", "--run-dir", str(folder))


def run(*args: str) -> int:
    return run_main(train.main, list(args))


def text_options(folder: Path) -> list[str]:
    """Write a small text to ``folder``; return options for a language model on it: 2 epochs of 5 steps."""
    file = folder / "text.txt"
    sentences = (f"the {n}th of {n * n % 17} numbers is {n * 7 % 13}, or so they say.\n" for n in range(70))
    file.write_text("".join(sentences))
    return ["--data", f"text:{file}", "--batch-size", "4", "--bptt", "100", "--target-compression", "1.2"]
