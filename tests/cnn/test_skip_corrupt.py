"""The training program and images that cannot be decoded: the run ends with the file's name, or counts and goes on."""

import json
import os
from pathlib import Path

import PIL.Image
import pytest

from str_triton.cnn import evaluate
from str_triton.training.metrics import read_metrics
from tests.cnn.train_runs import resume, run

OPTIONS = ["digits", "--method", "dense", "--epochs", "2", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes with eight small images each, decoded on demand; one is cut short."""
    monkeypatch.setattr("str_triton.cnn.data.encoded.MEMORY", 0)
    for part in ("train", "val"):
        for index in range(16):
            path = tmp_path / "data" / part / "ab"[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    path = tmp_path / "data" / "train" / "b" / "15.png"
    path.write_bytes(path.read_bytes()[:45])
    return path


def test_without_the_option_the_run_ends_with_the_files_name(
    damaged: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture
):
    options = [*OPTIONS, "--data", f"imagefolder:{damaged.parents[2]}", "--run-dir", str(tmp_path / "run")]
    assert run(*options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {damaged}: not a readable image (")


def test_with_it_corrupt_images_are_named_and_counted(
    damaged: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture
):
    data = f"imagefolder:{damaged.parents[2]}"
    assert run(*OPTIONS, "--data", data, "--skip-corrupt", "--run-dir", str(tmp_path / "run")) == 0
    epochs = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "epoch"]
    assert [record["corrupt"] for record in epochs] == [1, 1]
    said = capsys.readouterr().out.splitlines()
    named = [line for line in said if line.startswith("skipped in epoch ")]
    assert [line.split(": ")[1] for line in named] == [str(damaged)] * 2
    evaluated = [str(tmp_path / "run"), "--device", "cpu"]
    assert evaluate.main(evaluated) == 0
    (damaged.parents[2] / "val" / "a" / "00.png").write_bytes(b"")
    assert evaluate.main(evaluated) == 0  # by the run's own option
    assert "00.png" in capsys.readouterr().err


def test_a_run_that_ended_so_can_go_on_with_it(damaged: Path, tmp_path: Path, quick: None):
    options = [*OPTIONS, "--checkpoint-steps", "1", "--data", f"imagefolder:{damaged.parents[2]}"]
    assert run(*options, "--run-dir", str(tmp_path / "run")) == 2
    assert resume(tmp_path / "run", "--skip-corrupt") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skip_corrupt"]  # also for evaluate.py
    assert run(*options, "--skip-corrupt", "--run-dir", str(tmp_path / "other")) == 0
    results = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "other")]
    assert results[0] == results[1]


def test_names_of_files_reach_the_terminal_as_texts(
    damaged: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture
):
    os.rename(damaged, os.path.join(os.fsencode(damaged.parent), b"\x1b[2J\xff\n.png"))
    options = [*OPTIONS, "--epochs", "1", "--data", f"imagefolder:{damaged.parents[2]}"]
    assert run(*options, "--run-dir", str(tmp_path / "run")) == 2
    assert run(*options, "--skip-corrupt", "--run-dir", str(tmp_path / "skipped")) == 0
    output = capsys.readouterr()
    for text in (output.out, output.err):
        assert r"\x1b[2J\udcff" in text
        assert "\x1b[2J" not in text
