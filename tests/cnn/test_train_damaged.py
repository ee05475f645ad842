"""Runs whose files were damaged (all of them: tests/rnn), and numbers that become NaN or infinite."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from str_triton.cnn import train
from str_triton.cnn.config import METHODS
from tests.cnn.train_runs import begin, resume
from tests.damaged_runs import GOES_ON, STOPS, assert_goes_on, assert_stops, cases, damaged
from tests.runs import after_calls, assert_same_result


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after 8 of its 10 steps, with the checkpoints of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        after_calls(patch, train, "learning_rate", 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert begin(folder) == 143
    return folder


@cases(GOES_ON[::3])
def test_a_damaged_file_is_named_and_the_run_goes_on(
    tmp_path: Path,
    quick: None,
    stopped: Path,
    whole_run: Path,
    capsys: pytest.CaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    word: str,
):
    folder = damaged(stopped, tmp_path / "run", name, damage)
    code = resume(folder)
    assert_goes_on(code, word, capsys.readouterr().err)
    assert_same_result(folder, whole_run)


@cases(STOPS[::3])
def test_a_file_without_which_the_run_cannot_go_on_is_one_line(
    tmp_path: Path,
    quick: None,
    stopped: Path,
    capsys: pytest.CaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    word: str,
):
    assert_stops(resume(damaged(stopped, tmp_path / "run", name, damage)), word, capsys.readouterr().err)


def test_a_finished_run_without_its_metrics_ends_the_same(tmp_path: Path, quick: None, whole_run: Path):
    folder = damaged(whole_run, tmp_path / "run", "metrics.jsonl", lambda path: path.write_text("{\n"))
    (folder / "budget.json").write_text("{")
    before = (folder / "summary.json").read_text()
    assert resume(folder) == 0
    assert (folder / "budget.json").read_text() == (whole_run / "budget.json").read_text()
    assert [line for line in (folder / "summary.json").read_text().splitlines() if "seconds" not in line] == [
        line for line in before.splitlines() if "seconds" not in line
    ]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "keep-zeros"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_every_method_ends_with_one_line_when_its_numbers_are_none(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, method: str, value: str
):
    monkeypatch.setattr(train, "learning_rate", lambda config, steps, step: float(value) if step >= 7 else 0.01)
    code = begin(tmp_path / "run", "--method", method)
    assert_stops(code, "by step 8; the last good checkpoint is ", capsys.readouterr().err)
    assert (tmp_path / "run" / "checkpoints" / "step-000000006.pt").exists()


def test_a_directory_that_is_in_use_is_named_before_data_are_read(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(train, "load", lambda *args, **options: pytest.fail("the data were read"))
    assert_stops(begin(whole_run), "already holds a run", capsys.readouterr().err)
