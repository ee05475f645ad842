"""The training program killed, interrupted and resumed: the results equal those of an undisturbed run, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from str_triton.rnn import train
from tests.messages import holds
from tests.rnn.train_runs import RANK, TINY, begin, resume, text_options
from tests.runs import Killed, after_calls, assert_same_result, kill, last_checkpoint

ROOT = Path(__file__).parents[2]
SVD = ["--method", "svd-finetune", "--choose", "validation", "--batch-size", "50", "--epochs", "3", "--dropout", "0.3"]


@pytest.fixture(scope="module")
def whole_text_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return an undisturbed run of a language model, and its options."""
    folder = tmp_path_factory.mktemp("text")
    options = [*text_options(folder), "--cell", "lstm", "--dropout", "0.2", "--choose", "validation"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", lambda folder: "")
        assert begin(folder / "run", *options) == 0
    return folder / "run", options


@pytest.fixture(scope="module")
def whole_svd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an undisturbed run of svd-finetune: three epochs of four steps, cut after the first."""
    folder = tmp_path_factory.mktemp("svd") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", lambda folder: "")
        assert begin(folder, *SVD, *RANK) == 0
    return folder


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send a signal during a step."""
    after_calls(monkeypatch, train, "learning_rate", step, lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize(("number", "step", "code"), [(signal.SIGINT, 3, 130), (signal.SIGTERM, 5, 143)])
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
        stop_at(patch, step, number)
        assert begin(folder, *RANK) == code
    assert capsys.readouterr().err == (
        f"stopped after step {step}, which is saved; continue with: python rnn/train.py --resume --run-dir {folder}\n"
    )
    assert last_checkpoint(folder)["step"] == step
    assert resume(folder) == 0
    assert_same_result(folder, whole_run)


@pytest.mark.parametrize(("owner", "name", "number"), [(os, "replace", 3), (os, "fsync", 12)])
def test_a_run_killed_while_it_writes_ends_in_the_same_bits(
    tmp_path: Path, quick: None, whole_run: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int
):
    with monkeypatch.context() as patch:
        after_calls(patch, owner, name, number, kill)
        with pytest.raises(Killed):
            begin(tmp_path / "run", *RANK)
    assert resume(tmp_path / "run") == 0
    assert_same_result(tmp_path / "run", whole_run)


def test_kill_9_and_resume(tmp_path: Path, quick: None, whole_run: Path):
    """Kill a real process at an arbitrary moment after its first checkpoint."""
    folder = tmp_path / "run"
    command = [sys.executable, "rnn/train.py", *TINY, *RANK, "--run-dir", folder]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not list(folder.glob("checkpoints/*.pt")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        process.kill()
    assert resume(folder) == 0
    assert_same_result(folder, whole_run)


@pytest.mark.parametrize("step", [3, 7])
def test_a_language_model_goes_on_with_the_state_that_it_had(
    tmp_path: Path, quick: None, whole_text_run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, step: int
):
    whole, options = whole_text_run
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert begin(tmp_path / "run", *options) == 143
    h, c = last_checkpoint(tmp_path / "run")["carried"]
    assert h.shape == c.shape == (1, 4, 8)
    assert h.abs().min() > 0
    assert resume(tmp_path / "run") == 0
    assert_same_result(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("e", "é", "was 'e', and is 'f' now"),
        ("the 2th", "eth 2th", "labels of its training"),
        ("the 65th", "eth 65th", "labels of its validation"),
        ("the 69th", "eth 69th", "labels of its test"),
    ],
)
def test_another_text_than_before_is_refused(
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    old: str,
    new: str,
    words: str,
):
    options = text_options(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert begin(tmp_path / "run", *options) == 143
    text = (tmp_path / "text.txt").read_text()
    assert old in text
    (tmp_path / "text.txt").write_text(text.replace(old, new))
    capsys.readouterr()
    assert resume(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert holds(error, f"error: {tmp_path / 'run'} .. {words}")
    assert error.count("\n") == 1


def test_a_text_may_move(
    tmp_path: Path, quick: None, whole_text_run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
):
    whole, options = whole_text_run
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert begin(tmp_path / "run", *options) == 143
    data = f"text:{shutil.copy(whole.parent / 'text.txt', tmp_path / 'moved.txt')}"
    assert resume(tmp_path / "run", "--data", data) == 0
    assert_same_result(tmp_path / "run", whole)
    for file, option in (("config.json", "data"), ("data.json", "name")):
        assert json.loads((tmp_path / "run" / file).read_text())[option] == data


@pytest.mark.parametrize("step", [2, 4, 6])
def test_svd_finetune_goes_on_before_at_and_after_the_cut(
    tmp_path: Path, quick: None, whole_svd_run: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert begin(tmp_path / "run", *SVD, *RANK) == 143
    assert (last_checkpoint(tmp_path / "run")["cut_ranks"] is None) == (step <= 4)
    assert resume(tmp_path / "run") == 0
    assert_same_result(tmp_path / "run", whole_svd_run)


@pytest.mark.parametrize("change", [["--seed", "1"], ["text-lstm"], ["--target-rank", "20"], ["--method", "dense"]])
def test_resume_with_other_options_is_refused(whole_run: Path, change: list[str], capsys: pytest.CaptureFixture):
    assert resume(whole_run, *change) == 2
    assert capsys.readouterr().err.startswith("error: --")


def test_resume_of_a_finished_run_writes_the_end_again(whole_run: Path, quick: None):
    before = {name: (whole_run / name).read_bytes() for name in ("model.safetensors", "budget.json")}
    (whole_run / "model.safetensors").unlink()
    assert resume(whole_run) == 0
    assert before == {name: (whole_run / name).read_bytes() for name in before}
