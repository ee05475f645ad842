"""A run that was stopped, and its files damaged one at a time: what the tests of both programs do with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

LAST = "the last checkpoint"


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        remove(path)
        path.write_text(content)

    return write


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def zeros(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(40) + content[80:])


def change(**fields: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def checkpoint(**state: object) -> Callable[[Path], None]:
    return lambda path: torch.save(state, path)


def with_state(**fields: object) -> Callable[[Path], None]:
    return lambda path: torch.save(torch.load(path, weights_only=True) | fields, path)


RANDOM = [{"python": (), "numpy": (), "torch": None, "cuda": []}]
# The file, what happens to it, and what is said of it (nothing: "").
GOES_ON = [
    ("environment.json", remove, "environment.json"),
    ("environment.json", text(""), "environment.json"),
    ("environment.json", text("[1]"), "environment.json"),
    ("environment.json", text('{"resumed": 5}'), "environment.json"),
    ("metrics.jsonl", remove, "the record of step"),
    ("metrics.jsonl", half, "the record of step"),
    ("metrics.jsonl", zeros, "1 of 1 lines"),
    ("metrics.jsonl", text('{"step": "a", "kind": 3}\n[1]\n{"step": 1, "kind": "epoch", "x": NaN}\n'), "3 of 3 lines"),
    (
        "metrics.jsonl",
        text("[" * 100_000 + "\n" + '{"step": 1, "kind": "a", "x": 1' + "0" * 400 + "}\n"),
        "2 of 2 lines",
    ),
    ("budget.json", half, ""),
    ("lock", text("\0\0"), ""),
    ("events", remove, ""),
    (LAST, remove, ""),
    (LAST, half, "trying the one before"),
    (LAST, zeros, "trying the one before"),
    (LAST, checkpoint(x=1), "trying the one before"),
    (LAST, with_state(step=7), "step 7"),
    ("checkpoints", remove, "the run starts again"),
]
STOPS = [
    ("config.json", remove, "there is no run"),
    ("config.json", half, "config.json"),
    ("config.json", text("[1]"), "config.json"),
    ("config.json", change(epochs="5"), "epochs is '5', and must be a whole number"),
    ("config.json", change(lr=True), "lr is True, and must be a number"),
    ("config.json", change(device="zzz"), "device is 'zzz', and must be 'auto' or 'cpu' or 'cuda'"),
    ("config.json", change(run_dir=[1]), "run_dir is [1], and must be a text or null"),
    ("config.json", change(epochs=0), "--epochs 0"),
    ("config.json", change(recipe="zzz"), "'zzz'"),
    ("config.json", change(of_the_future=1), "of_the_future"),
    ("checkpoints", text(""), "checkpoints"),
    ("events", text(""), "events"),
    (LAST, with_state(model={}), "another network"),
    (LAST, with_state(steps=4), "4 steps"),
    (LAST, with_state(random=RANDOM), "does not fit this run"),
    (LAST, with_state(optimizer={}), "does not fit this run"),
    (LAST, with_state(controller={"x": 1}), "does not fit this run"),
]


def damaged(stopped: Path, folder: Path, name: str, damage: Callable[[Path], None]) -> Path:
    """Return a copy of a stopped run with one file damaged."""
    shutil.copytree(stopped, folder)
    damage(max((folder / "checkpoints").glob("*.pt")) if name == LAST else folder / name)
    return folder


def assert_goes_on(code: int, word: str, said: str) -> None:
    assert code == 0
    assert word in said
    assert all(line.startswith("warning: ") for line in said.splitlines())
    assert bool(said) == bool(word)


def assert_stops(code: int, word: str, said: str) -> None:
    assert code == 2
    (line,) = (line for line in said.splitlines() if not line.startswith("warning: "))
    assert line.startswith("error: ")
    assert word in line


def cases(table: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "damage", "word"), table, ids=[f"{row[0]}-{row[2]}" for row in table])
