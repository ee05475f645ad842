"""Trackers: what they get, a resumed run, a tracker that fails, and the real libraries where they are installed."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from str_triton.training import trackers
from str_triton.training.errors import UserError
from str_triton.training.metrics import read_metrics
from str_triton.training.run import Run

RECORD = {"kind": "epoch", "step": 3, "epoch": 1, "accuracy": 0.5, "layers": {"conv1": {"sparsity": 0.9}}, "text": "x"}


class Recorder:
    """A tracker of accelerate that keeps what it gets, and fails at a step of choice."""

    made: list["Recorder"]

    def __init__(self, name: str, folder: Path, before: str | None) -> None:
        self.name, self.before, self.calls, self.fails = name, before, [], None
        self.tracker = SimpleNamespace(id=before or "new", info=SimpleNamespace(run_id=before or "new"))
        self.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails:
            raise ConnectionError("no\nnetwork")
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr(trackers, "_make", Recorder)
    monkeypatch.setattr(trackers, "require_tracker", lambda name: None)
    monkeypatch.setattr("str_triton.training.run.require_tracker", lambda name: None)
    return Recorder.made


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(accelerator: Accelerator, path: Path, log_with: str, *records: dict[str, Any], resume: bool = False) -> None:
    with Run.open(accelerator, {"lr": 0.1, "log_with": log_with}, path, resume=resume, program="train") as opened:
        opened.restore(10)
        for record in records:
            opened.log(record)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_gets_the_numbers_of_the_metrics(
    accelerator: Accelerator, tmp_path: Path, made: list[Recorder], name: str
):
    run(accelerator, tmp_path / "run", name, RECORD)
    (tracker,) = made
    start, config, (step, values), finish = tracker.calls
    assert (start, finish, tracker.name, step) == ("start", "finish", name, 3)
    assert config == {"lr": 0.1, "log_with": name}
    assert values.pop("epoch/seconds") >= 0
    assert values == {"epoch/epoch": 1, "epoch/accuracy": 0.5, "sparsity/conv1": 0.9}


def test_a_resumed_run_continues_the_run_of_its_tracker(accelerator: Accelerator, tmp_path: Path, made: list[Recorder]):
    run(accelerator, tmp_path / "run", "wandb")
    run(accelerator, tmp_path / "run", "wandb", RECORD, resume=True)
    run(accelerator, tmp_path / "run", "mlflow", resume=True)
    assert [tracker.before for tracker in made] == [None, "new", None]
    assert {"lr": 0.1, "log_with": "wandb"} not in made[1].calls


def test_a_tracker_that_fails_is_switched_off(
    accelerator: Accelerator, tmp_path: Path, made: list[Recorder], capsys: pytest.CaptureFixture
):
    with Run.open(accelerator, {"log_with": "wandb"}, tmp_path / "run", resume=False, program="train") as opened:
        opened.restore(10)
        made[0].fails = 3
        for step in (2, 3, 4):
            opened.log(RECORD | {"step": step})
    assert [call[0] for call in made[0].calls if isinstance(call, tuple)] == [2]
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [2, 3, 4]
    error = capsys.readouterr().err
    assert "--log-with wandb" in error
    assert "no network" in error
    assert error.count("\n") == 1


def test_tensorboard_needs_no_tracker(accelerator: Accelerator, tmp_path: Path, made: list[Recorder]):
    run(accelerator, tmp_path / "run", "tensorboard", RECORD)
    assert not made
    assert list((tmp_path / "run" / "events").iterdir())


@pytest.mark.parametrize("content", ["", "[]", '{"wandb": 3}', "{", '{"mlflow": "x"}'])
def test_a_damaged_note_starts_a_new_run(accelerator: Accelerator, tmp_path: Path, made: list[Recorder], content: str):
    run(accelerator, tmp_path / "run", "wandb")
    (tmp_path / "run" / trackers.FILE).write_text(content)
    run(accelerator, tmp_path / "run", "wandb", resume=True)
    assert made[1].before is None


def test_a_missing_package_is_one_line(accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log-with wandb .*pip install wandb"):
        run(accelerator, tmp_path / "run", "wandb")
    assert not (tmp_path / "run").exists()


def test_wandb(accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(accelerator, tmp_path / "run", "wandb", RECORD)
    name = json.loads((tmp_path / "run" / trackers.FILE).read_text())["wandb"]
    run(accelerator, tmp_path / "run", "wandb", resume=True)
    assert json.loads((tmp_path / "run" / trackers.FILE).read_text())["wandb"] == name
    wandb.teardown()  # finish() only tells wandb's process to close the file; this waits until that process has ended
    written = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    content = b"".join(path.read_bytes() for path in written)
    for word in (b"epoch/accuracy", b"sparsity/conv1", b"log_with"):
        assert word in content


def test_mlflow(accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run(accelerator, tmp_path / "run", "mlflow", RECORD)
    run(accelerator, tmp_path / "run", "mlflow", RECORD | {"step": 5, "accuracy": 0.75}, resume=True)
    name = json.loads((tmp_path / "run" / trackers.FILE).read_text())["mlflow"]
    client = mlflow.MlflowClient()
    assert client.get_run(name).data.params["lr"] == "0.1"
    history = client.get_metric_history(name, "epoch/accuracy")
    assert [(entry.step, entry.value) for entry in history] == [(3, 0.5), (5, 0.75)]
    assert client.get_run(name).info.status == "FINISHED"
