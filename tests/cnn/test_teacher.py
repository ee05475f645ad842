"""Knowledge distillation: the loss, what a teacher must be, and runs with one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from str_triton.cnn import train
from str_triton.cnn.models import build
from str_triton.cnn.teacher import divergence, read_teacher
from str_triton.training.interface import Interface
from str_triton.training.metrics import read_metrics
from tests.cnn.train_runs import begin, resume
from tests.messages import holds
from tests.runs import Killed, after_calls, assert_same_result, kill


def test_the_divergence_is_that_of_softened_probabilities():
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 7, dtype=torch.bfloat16), torch.randn(5, 7, dtype=torch.bfloat16)
    p, q = (F.softmax(scores.double() / 2, 1) for scores in (theirs, ours))
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    result = divergence(ours, theirs)
    assert result.dtype == torch.float32
    assert abs(result.item() - expected.item()) < 1e-6
    assert divergence(theirs, theirs).item() == 0


@pytest.fixture
def teacher(tmp_path: Path, quick: None, small: list[str]) -> Path:
    """Return the folder of a tiny dense run."""
    assert begin(tmp_path / "teacher", *small, "--method", "dense") == 0
    return tmp_path / "teacher"


def first_loss(folder: Path) -> float:
    return next(record["loss"] for record in read_metrics(folder) if "loss" in record)


def test_a_teacher_gives_its_share_of_the_loss(teacher: Path, tmp_path: Path, small: list[str]):
    losses, options = {}, [*small, "--epochs", "1"]
    for share in ("0", "0.5", "1"):
        assert begin(tmp_path / share, *options, "--teacher", str(teacher), "--teacher-share", share) == 0
        losses[share] = first_loss(tmp_path / share)
    assert begin(tmp_path / "alone", *options) == 0
    assert losses["0"] == first_loss(tmp_path / "alone")
    assert len(set(losses.values())) == 3


def test_a_run_with_a_teacher_resumes_in_equal_bits(
    teacher: Path, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
):
    options = [*small, "--teacher", str(teacher / "model.safetensors"), "--checkpoint-steps", "1"]
    assert begin(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        after_calls(patch, train.Experiment, "forward", 4, kill)
        with pytest.raises(Killed):
            begin(tmp_path / "killed", *options)
    assert resume(tmp_path / "killed") == 0
    assert_same_result(tmp_path / "whole", tmp_path / "killed")


def test_a_run_resumed_with_another_teacher_is_refused(
    teacher: Path, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with monkeypatch.context() as patch:
        after_calls(patch, train.Experiment, "forward", 4, kill)
        with pytest.raises(Killed):
            begin(tmp_path / "run", *small, "--teacher", str(teacher))
    shutil.rmtree(teacher)
    assert begin(teacher, *small, "--method", "dense", "--seed", "1") == 0
    capsys.readouterr()
    assert resume(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert holds(error, "error: --teacher .. other weights")
    assert error.count("\n") == 1


def test_a_teacher_of_other_classes_or_another_standardisation_is_refused(teacher: Path):
    own = Interface.read(teacher / "interface.json")
    assert read_teacher(teacher, own).training is False
    mean, std = own.standardisation
    read_teacher(teacher, replace(own, standardisation=((mean[0] + 0.009 * std[0],), std)))  # a few images were added
    swapped = Interface((own.outputs[1], own.outputs[0], *own.outputs[2:]), own.standardisation, own.images)
    shifted = Interface(own.outputs, (tuple(value + 1 for value in mean), std), own.images)
    for other, words in ((swapped, "order"), (shifted, "standardises"), (Interface(("a", "b")), "10 classes")):
        with pytest.raises(ValueError, match=words):
            read_teacher(teacher, other)


def test_a_teacher_for_classes_without_names_is_taken_with_a_warning(teacher: Path, capsys: pytest.CaptureFixture):
    """The teacher's own classes are the digits, which could be the numbers of any ten classes."""
    own = Interface.read(teacher / "interface.json")
    capsys.readouterr()
    read_teacher(teacher, replace(own, outputs=tuple("abcdefghij")))
    assert holds(capsys.readouterr().err, "warning: .. the network has numbers .. order of the classes")


def test_weights_alone_are_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save(build("resnet-digits", num_classes=10, in_channels=1).state_dict(), tmp_path / "x.pt")
    assert begin(tmp_path / "run", "--model", "resnet-digits", "--teacher", str(tmp_path / "x.pt")) == 2
    error = capsys.readouterr().err
    assert holds(error, f"{tmp_path / 'x.pt'} .. a teacher must be a run")
    assert "--model" not in error


def test_a_teacher_for_images_of_another_size_is_taken_with_a_warning(teacher: Path, capsys: pytest.CaptureFixture):
    own = Interface.read(teacher / "interface.json")
    capsys.readouterr()
    read_teacher(teacher, own)
    assert capsys.readouterr().err == ""
    read_teacher(teacher, replace(own, images=replace(own.images, width=10, crop=0.875)))
    assert holds(capsys.readouterr().err, "8x8 of the whole image; .. 10x8 of the central square of 87.50 %")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--teacher", "nowhere"], "nowhere"),
        (["--teacher", "nowhere", "--teacher-share", "1.5"], "--teacher-share 1.5"),
        (["--teacher-share", "0.5"], "name one with --teacher RUN"),
    ],
)
def test_a_wrong_teacher_is_one_line(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert begin(tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
