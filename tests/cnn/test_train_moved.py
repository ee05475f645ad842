"""A run resumed with data or a teacher at another address: the checkpoint must show that they are the same."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from str_triton.cnn import train
from str_triton.cnn.config import without_address
from tests.cnn.train_runs import resume, run
from tests.messages import holds
from tests.runs import after_calls, assert_same_result


@pytest.fixture
def options(tmp_path: Path, quick: None, small: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options of a tiny run on two classes of images below data/, in the present directory."""
    draws = np.random.default_rng(0)
    for part in ("train", "val"):
        for index in range(16):
            path = tmp_path / "data" / part / "ab"[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(draws.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    eight_steps = ["--epochs", "2", "--batch-size", "4", "--checkpoint-steps", "2", "--device", "cpu"]
    return ["digits", *eight_steps, *small, "--data", "imagefolder:data"]


def stopped(monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """Return the folder of a run that was stopped after three of eight steps."""
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*options, "--run-dir", "run") == 143
    return Path("run")


def without_key(folder: Path, *keys: str) -> None:
    """Remove entries of the newest checkpoint, as if an older version had written it."""
    path = max((folder / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if key not in keys}, path)


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_data_may_move(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run(*options, "--run-dir", "whole") == 0
    folder, before = stopped(monkeypatch, *options), config(Path("whole"))["data"]
    (tmp_path / "data").rename(tmp_path / "moved")
    present = f"imagefolder:{tmp_path / 'moved'}"
    assert (config(folder)["data"], resume(folder, "--data", present)) == (before, 0)
    assert_same_result(folder, Path("whole"))
    assert config(folder) == config(Path("whole")) | {"data": present, "run_dir": "run"}
    assert resume(folder) == 0


def test_other_data_at_the_new_address_are_refused(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    folder = stopped(monkeypatch, *options)
    (tmp_path / "data").rename(tmp_path / "moved")
    image = tmp_path / "moved" / "val" / "a" / "00.png"
    image.write_bytes((tmp_path / "moved" / "val" / "b" / "01.png").read_bytes())
    capsys.readouterr()
    assert resume(folder, "--data", "imagefolder:moved") == 2
    assert holds(capsys.readouterr().err, "in 1 of 16 sampled test examples")
    assert resume(folder, "--data", "hub:moved") == 2
    assert holds(capsys.readouterr().err, "data imagefolder:data, not hub:moved .. alters the result")
    assert config(folder)["data"] == "imagefolder:data"


def test_a_checkpoint_that_does_not_show_the_data_is_not_enough(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    folder = stopped(monkeypatch, *options)
    without_key(folder, "parts")
    capsys.readouterr()
    assert resume(folder, "--data", "imagefolder:./data") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert holds(error, "error: --resume: .. data imagefolder:data, not imagefolder:./data; no checkpoint shows")
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    assert resume(folder, "--data", "imagefolder:./data") == 2
    assert resume(folder) == 0


def test_a_teacher_may_move(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert run(*options, "--method", "dense", "--run-dir", "teacher") == 0
    folder = stopped(monkeypatch, *options, "--teacher", "teacher")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    capsys.readouterr()
    assert resume(folder, "--teacher", "none") == 2
    assert holds(capsys.readouterr().err, "teacher teacher, not None; .. alters the result")
    assert resume(folder, "--teacher", "moved") == 0
    assert config(folder)["teacher"] == "moved"
    without_key(folder, "networks")
    (tmp_path / "moved").rename(tmp_path / "again")
    assert resume(folder, "--teacher", "again") == 2
    assert holds(capsys.readouterr().err, "teacher moved, not again; no checkpoint shows")


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("imagefolder:a", "imagefolder:/b:c", True),
        ("hub:a", "hub:/b/c", True),
        ("hub:a:x", "hub:b:x", True),
        ("hub:a:x", "hub:a:y", False),
        ("hub:a:x", "hub:a", False),
        ("hub:a", "imagefolder:a", False),
        ("emnist:letters", "emnist:digits", False),
    ],
)
def test_the_kind_and_the_configuration_of_the_data_stay(before: str, now: str, same: bool):
    assert (without_address(before) == without_address(now)) == same
