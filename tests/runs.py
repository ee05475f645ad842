"""Helpers of the tests of both training programs: run one, disturb it, and compare what it left."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from str_triton.training.metrics import read_metrics


class Killed(BaseException):
    """Ends a run where it stands, as kill -9 does: nothing catches it."""


def kill() -> None:
    raise Killed


def run_main(main: Callable[[list[str]], int], args: list[str]) -> int:
    """Return the exit code of ``main``, and undo what it sets for its whole process."""
    threads = torch.get_num_threads()
    try:
        return main(args)
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


def last_checkpoint(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints").glob("*.pt")), weights_only=True)


def same_bits(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def assert_same_result(folder: Path, whole: Path) -> None:
    """Check that two finished runs ended in the same bits."""
    ours, theirs = last_checkpoint(folder), last_checkpoint(whole)
    ours, theirs = (
        {k: v for k, v in state.items() if k not in ("seconds", "random", "record")} for state in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert same_bits(ours[key], theirs[key]), key
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (folder / "budget.csv").read_text() == (whole / "budget.csv").read_text()
    ours, theirs = ([without_times(record) for record in read_metrics(place)] for place in (folder, whole))
    assert ours == theirs


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("seconds", "examples_per_second")}


def after_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, act: Callable) -> None:
    """Call ``act`` when ``owner.name`` is called for the ``number``-th time, before it does its work."""
    original, calls = getattr(owner, name), 0

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
