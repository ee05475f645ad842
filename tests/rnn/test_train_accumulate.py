"""--accumulate and several processes in recurrent training: the same results except for rounding."""

import os
import signal
from pathlib import Path

import pytest
import torch

from str_triton.rnn import train
from str_triton.training import run
from tests.processes import run_job
from tests.rnn.train_runs import RANK, TINY, begin, resume, text_options
from tests.runs import after_calls, assert_same_result, last_checkpoint

# Augmentation draws once for a process's whole share, so its parts see the same noise.
SPEECH = [*RANK, "--batch-size", "52"]


def options_of(kind: str, folder: Path) -> list[str]:
    """Return options without dropout, whose random numbers for parts differ from those for the whole batch."""
    return [*(SPEECH if kind == "speech" else text_options(folder)), "--dropout", "0"]


def train_stopped(args: list[str]) -> int:
    """Train in one of several processes, with a signal in the third step."""
    run.AGREE_SECONDS = 0.0
    with pytest.MonkeyPatch.context() as patch:
        after_calls(patch, train, "learning_rate", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train.main(args)


def assert_close(folder: Path, whole: Path) -> None:
    ours, theirs = last_checkpoint(folder), last_checkpoint(whole)
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours["carried"], theirs["carried"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["speech", "text"])
def test_parts_change_rounding_alone_and_resume_in_the_same_bits(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, kind: str
):
    options = options_of(kind, tmp_path)
    assert begin(tmp_path / "whole", *options) == 0
    assert begin(tmp_path / "parts", *options, "--accumulate", "2") == 0
    assert_close(tmp_path / "parts", tmp_path / "whole")
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert begin(tmp_path / "stopped", *options, "--accumulate", "2") == 143
    assert resume(tmp_path / "stopped") == 0
    assert_same_result(tmp_path / "stopped", tmp_path / "parts")


def test_a_language_model_in_two_processes_goes_on_in_one(tmp_path: Path, quick: None):
    options = options_of("text", tmp_path)
    assert begin(tmp_path / "whole", *options) == 0
    job = run_job(tmp_path, train_stopped, [*TINY, *options, "--accumulate", "2", "--run-dir", str(tmp_path / "run")])
    assert job.codes == [143, 143], job.err
    assert last_checkpoint(tmp_path / "run")["carried"][0].shape[1] == 4
    assert resume(tmp_path / "run") == 0
    assert_close(tmp_path / "run", tmp_path / "whole")
