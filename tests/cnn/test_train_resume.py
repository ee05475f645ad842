"""The training program killed, interrupted, out of disk, resumed: it ends in the same bits as if nothing had been."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from str_triton.cnn import train
from str_triton.cnn.data import Data
from str_triton.cnn.data.normalisation import Normalisation
from str_triton.training.checkpoints import Checkpoints
from str_triton.training.interface import INTERFACE
from tests.cnn.train_runs import TINY, begin, resume
from tests.messages import holds
from tests.runs import Killed, after_calls, assert_same_result, kill, last_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("owner", "name", "number"), [(os, "replace", 3), (os, "fsync", 12), (Checkpoints, "save", 3)])
def test_a_run_killed_while_it_writes_ends_in_the_same_bits(
    tmp_path: Path, quick: None, whole_run: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int
):
    with monkeypatch.context() as patch:
        after_calls(patch, owner, name, number, kill)
        with pytest.raises(Killed):
            begin(tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert resume(tmp_path / "run") == 0
    assert_same_result(tmp_path / "run", whole_run)


@pytest.mark.parametrize(
    ("number", "step", "code"), [(signal.SIGINT, 3, 130), (signal.SIGTERM, 5, 143), (signal.SIGINT, 9, 130)]
)
def test_a_signal_saves_the_step_and_says_how_to_go_on(
    tmp_path: Path,
    quick: None,
    whole_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    number: int,
    step: int,
    code: int,
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", step, lambda: os.kill(os.getpid(), number))
        assert begin(folder) == code
    assert capsys.readouterr().err == (
        f"stopped after step {step}, which is saved; continue with: python cnn/train.py --resume --run-dir {folder}\n"
    )
    assert last_checkpoint(folder)["step"] == step
    assert resume(folder) == 0
    assert_same_result(folder, whole_run)


def test_kill_9_and_resume(tmp_path: Path, quick: None, whole_run: Path):
    """A real process, killed at whatever moment comes after its first checkpoint."""
    folder = tmp_path / "run"
    command = [sys.executable, "cnn/train.py", *TINY, "--run-dir", folder]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not list(folder.glob("checkpoints/*.pt")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
    assert resume(folder) == 0
    assert_same_result(folder, whole_run)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, quick: None, whole_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        begin(folder)
    newest = max((folder / "checkpoints").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert resume(folder) == 0
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert_same_result(folder, whole_run)


def test_a_full_disk_is_one_message_and_the_run_goes_on_later(
    tmp_path: Path, quick: None, whole_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # noqa: E731
            after_calls(patch, train, "learning_rate", 6, fill)
            assert begin(folder) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "cannot be written: File too large; the last complete one is" in error
    assert error.count("\n") == 1
    assert last_checkpoint(folder)["step"] == 5
    assert resume(folder) == 0
    assert_same_result(folder, whole_run)


def test_a_run_in_use_is_refused(whole_run: Path, capsys: pytest.CaptureFixture):
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, whole_run / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert [resume(whole_run), begin(whole_run)] == [2, 2]
        other.kill()
    assert capsys.readouterr().err.count("is in use by another run (process ") == 2


@pytest.mark.parametrize("change", [["--seed", "1"], ["fashion-mnist"], ["--epochs", "3"], ["--method", "dense"]])
def test_resume_with_other_options_is_refused(whole_run: Path, change: list[str], capsys: pytest.CaptureFixture):
    assert resume(whole_run, *change) == 2
    assert "an option that alters the result cannot change" in capsys.readouterr().err


def test_resume_of_a_finished_run_writes_the_end_again(whole_run: Path, quick: None):
    summary = (whole_run / "summary.json").read_text()
    assert resume(whole_run) == 0
    assert (whole_run / "summary.json").read_text() == summary
    assert len(json.loads((whole_run / "environment.json").read_text())["resumed"]) == 1


@pytest.fixture
def finished(whole_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole_run, tmp_path / "run")


@pytest.fixture
def unfinished(finished: Path) -> Path:
    """Return a run that was killed two steps before its end."""
    for path in (max((finished / "checkpoints").glob("*.pt")), finished / INTERFACE, finished / "model.safetensors"):
        path.unlink()
    return finished


def with_data(monkeypatch: pytest.MonkeyPatch, change: Callable[[Data], Data]) -> None:
    load = train.load
    monkeypatch.setattr(train, "load", lambda *args: change(load(*args)))


def renamed(data: Data) -> Data:
    return dataclasses.replace(data, class_names=tuple("0132456789"))


def changed(part: str, data: Data, **changes: Callable[[Tensor], Tensor]) -> Data:
    images = getattr(data, part)
    other = {key: change(getattr(images, key)) for key, change in changes.items()}
    return dataclasses.replace(data, **{part: dataclasses.replace(images, **other)})


training, held_out = partial(changed, "train"), partial(changed, "test")


@pytest.mark.parametrize("run", ["finished", "unfinished"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "output 2 was '2', and is '3' now"),
        (lambda data: dataclasses.replace(data, class_names=(*data.class_names, "x")), "output 10 was missing .. 'x'"),
        (lambda data: dataclasses.replace(data, crop=0.875), "1 x 8 x 8, of the whole image .. 87.50 %"),
        (partial(training, labels=lambda labels: (labels + 1) % 10), "labels"),
        (partial(training, images=lambda images: 255 - images), "in 16 of 16 sampled training examples"),
        (partial(training, images=lambda images: images[:1000], labels=lambda labels: labels[:1000]), "1,438 .. 1,000"),
        (partial(held_out, labels=lambda labels: labels.roll(1)), "labels of its test examples"),
        (partial(held_out, images=lambda images: images.roll(1, 0)), "in 16 of 16 sampled test examples"),
    ],
)
def test_other_data_are_refused(
    run: str,
    change: Callable[[Data], Data],
    words: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    folder = request.getfixturevalue(run)
    files = [path for path in (folder / INTERFACE, folder / "model.safetensors") if path.exists()]
    before = [path.read_bytes() for path in files]
    with_data(monkeypatch, change)
    assert resume(folder) == 2
    error = capsys.readouterr().err
    assert holds(error, f"error: {folder} .. {words}")
    assert error.count("\n") == 1
    assert before == [path.read_bytes() for path in files]


def test_a_checkpoint_without_a_fingerprint_is_compared_by_its_steps(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """As older versions wrote it. No checkpoint may be given up for other data."""
    path = max((unfinished / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    del state["parts"]
    torch.save(state, path)
    few = lambda tensor: tensor[:1000]  # noqa: E731
    with_data(monkeypatch, partial(training, images=few, labels=few))
    assert resume(unfinished) == 2
    error = capsys.readouterr().err
    assert holds(error, "5 steps .. 3 now .. resume it with the data that it began with")
    assert "checkpoints" not in error


def test_a_checkpoint_with_the_fingerprint_of_the_training_data_alone_is_compared_with_them(
    unfinished: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """As older versions wrote it."""
    path = max((unfinished / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    state["data"] = state.pop("parts")["training"]
    torch.save(state, path)
    with monkeypatch.context() as patch:
        with_data(patch, partial(training, labels=lambda labels: labels.roll(1)))
        assert resume(unfinished) == 2
    assert "the labels of its training examples" in capsys.readouterr().err
    assert resume(unfinished) == 0


def test_another_rounding_of_the_standardisation_changes_nothing(
    unfinished: Path, quick: None, whole_run: Path, monkeypatch: pytest.MonkeyPatch
):
    def rounded(data: Data) -> Data:
        mean, std = data.test.normalisation.mean, data.test.normalisation.std
        normalisation = Normalisation((mean[0] * (1 + 1e-7),), std)
        return dataclasses.replace(data, test=dataclasses.replace(data.test, normalisation=normalisation))

    with_data(monkeypatch, rounded)
    assert resume(unfinished) == 0
    assert (unfinished / INTERFACE).read_text() == (whole_run / INTERFACE).read_text()


def test_a_checkpoint_without_an_interface_is_compared_with_the_one_of_the_finished_run(
    finished: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """As older versions wrote it."""
    path = max((finished / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    del state["interface"], state["parts"]
    torch.save(state, path)
    assert resume(finished) == 0
    with_data(monkeypatch, renamed)
    assert resume(finished) == 2
    assert "output 2 was '2', and is '3' now" in capsys.readouterr().err
    (finished / INTERFACE).unlink()
    assert resume(finished) == 0


def test_workers_and_checkpoints_do_not_change_the_result(tmp_path: Path, quick: None, whole_run: Path):
    folder = tmp_path / "run"
    assert begin(folder, "--workers", "2", "--checkpoint-steps", "1000") == 0
    assert_same_result(folder, whole_run)
