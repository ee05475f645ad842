"""The training program from outside: what it writes and what it refuses."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from str_triton import Budget, count, refresh_batch_norm, sparsify
from str_triton.cnn import data, train
from str_triton.cnn.models import build
from str_triton.training.metrics import read_metrics
from tests.cnn.train_runs import begin, run
from tests.messages import holds
from tests.runs import last_checkpoint

SUMMARY = ["accuracy", "sparsity", "nonzeros", "params", "flops", "dense_flops", "epochs", "seconds", "seed", "recipe"]


def test_a_run_writes_everything(whole_run: Path):
    expected = {"budget.csv", "budget.json", "checkpoints", "config.json", "environment.json", "events", "lock"}
    expected |= {"interface.json", "metrics.jsonl", "model.safetensors", "report.html", "summary.json"}
    assert {path.name for path in whole_run.iterdir()} == expected
    summary = json.loads((whole_run / "summary.json").read_text())
    assert list(summary) == SUMMARY
    assert abs(summary["sparsity"] - 0.9) <= 1e-4
    assert (summary["epochs"], summary["seed"], summary["recipe"]) == (2, 0, "digits")
    budget = Budget.from_json(whole_run / "budget.json")
    assert budget == Budget.from_csv(whole_run / "budget.csv")
    assert (summary["nonzeros"], summary["flops"]) == (budget.nonzeros, budget.flops)
    epochs = [record for record in read_metrics(whole_run) if record["kind"] == "epoch"]
    assert [(record["epoch"], record["step"]) for record in epochs] == [(1, 5), (2, 10)]
    assert epochs[-1]["accuracy"] == summary["accuracy"]
    config = json.loads((whole_run / "config.json").read_text())
    assert (config["target_sparsity"], config["gradient"], config["method"]) == (0.9, "switched", "str-exact")
    assert json.loads((whole_run / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_the_saved_model_is_dense_and_has_the_measured_accuracy(whole_run: Path):
    model = build("resnet-digits", num_classes=10, in_channels=1)
    model.load_state_dict(safetensors.torch.load_file(whole_run / "model.safetensors"))
    test = data.load("digits").test
    pixels, labels = test.batch(torch.arange(len(test)), seed=0, epoch=0, augment=False)
    images = test.normalisation(pixels)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert (model.eval()(images).argmax(1) == labels).double().mean() == pytest.approx(summary["accuracy"], abs=0.003)
    assert count(model, images[:1]).nonzeros == summary["nonzeros"]


def test_the_statistics_of_batch_norm_are_those_of_the_saved_weights(whole_run: Path):
    """Recomputed from training batches, while running averages of ten steps are still far from any weights'."""
    model = build("resnet-digits", num_classes=10, in_channels=1)
    model.load_state_dict(safetensors.torch.load_file(whole_run / "model.safetensors"))
    saved = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    stream = data.batches(
        data.load("digits").train,
        batch_size=256,
        seed=0,
        epoch=2,
        augment=True,
        shuffle=True,
        workers=0,
        drop_last=True,
    )
    refresh_batch_norm(model, stream)
    for name, buffer in saved.items():
        torch.testing.assert_close(model.get_buffer(name), buffer, atol=1e-3, rtol=1e-3)


def test_evaluation_and_checkpoints_see_the_schedules_exact_value(whole_run: Path):
    """With ten steps the thresholds of training itself are solved for at the first and the last alone."""
    first = next(record for record in read_metrics(whole_run) if record["kind"] == "epoch")
    assert first["sparsity"] == pytest.approx(0.9 * (1 - (1 - 0.5 / 0.7) ** 3), abs=2e-5)
    state = torch.load(whole_run / "checkpoints" / "step-000000008.pt", weights_only=True)
    model = sparsify(build("resnet-digits", num_classes=10, in_channels=1))
    model.load_state_dict(state["model"])
    assert count(model, torch.zeros(1, 1, 8, 8)).sparsity == pytest.approx(0.9, abs=2e-5)


def test_a_flop_target_is_a_share_of_dense(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture):
    assert begin(tmp_path / "run", "--target-flops", "0.1") == 0
    said = capsys.readouterr().out.splitlines()
    opening = dict(line.split(maxsplit=1) for line in said[:5])
    assert list(opening) == ["data", "model", "target", "device", "folder"]
    for heading, figures in {
        "data": ["digits", "1,438", "359", "1x8x8", "10 classes"],
        "model": ["resnet-digits", "76,704"],
        "target": ["10.00 %", "str-exact", "fixed"],
        "device": ["cpu", "thread"],
        "folder": [str(tmp_path / "run")],
    }.items():
        assert all(figure in opening[heading] for figure in figures)
    # The first of ten steps, before any evaluation: the cubic schedule at a tenth of training.
    assert f"FLOPs {100 * (1 - 0.9 * (1 - (6 / 7) ** 3)):.2f} %" in said[5]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["flops"] == pytest.approx(0.1 * summary["dense_flops"], rel=1e-3)


@pytest.mark.parametrize("method", ["dense", "str"])
def test_methods_without_a_target(tmp_path: Path, quick: None, method: str, capsys: pytest.CaptureFixture):
    assert begin(tmp_path / "run", "--method", method) == 0
    out, err = capsys.readouterr()
    assert "nothing will be pruned" not in err
    assert ("after epoch 1" in out) == (method == "str")  # the last count's sparsity: there is no schedule
    state = last_checkpoint(tmp_path / "run")
    assert state["controller"] is None
    raws = [value for name, value in state["model"].items() if name.endswith("raw_threshold")]
    assert len(raws) == (7 if method == "str" else 0)
    assert all(raw.item() > -5.0 for raw in raws)  # weight decay has drawn them towards 0


def test_thresholds_that_will_not_arrive_are_warned_of(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture):
    assert begin(tmp_path / "run", "--method", "str", "--raw-threshold-init", "-3200") == 0
    assert " from -3200 to -31" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["sparsity"] == 0.0


@pytest.mark.parametrize(
    ("option", "values"), [("--granularity", ("global", "filter")), ("--distribution", ("flop-aware", "learned"))]
)
def test_other_thresholds_meet_the_target_too(
    tmp_path: Path, quick: None, small: list[str], option: str, values: tuple[str, str]
):
    for value in values:
        folder = tmp_path / value
        assert begin(folder, *small, option, value) == 0
        assert abs(json.loads((folder / "summary.json").read_text())["sparsity"] - 0.9) <= 1e-4


# What a person can get wrong.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cifar"], "no recipe cifar .. cifar10"),
        (["har6-gru"], "python rnn/train.py har6-gru"),
        (["--target-sparsity", "1.2"], "--target-sparsity 1.2"),
        (["--distribution", "learned", "--method", "dense"], "--distribution learned .. --method dense"),
        (["--target-sparsity", "-0.1"], "--target-sparsity -0.1"),
        (["--target-sparsity", "nan"], "--target-sparsity nan"),
        (["--target-flops", "1.2"], "--target-flops 1.2"),
        (["--target-flops", "0.00001"], "cannot be met"),
        (["--target-sparsity", "0.99999"], "cannot be met"),
        (["--target-flops", "0.1", "--target-sparsity", "0.9"], "choose one"),
        (["--method", "str", "--target-sparsity", "0.9"], "--target-sparsity 0.9 .. --method str .. no target"),
        (["--method", "dense", "--target-flops", "0.9"], "--target-flops 0.9 .. --method dense .. no target"),
        (["--batch-size", "2000"], "batch size 2000 .. 1438 training images"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--epochs", "0"], "--epochs 0"),
        (["--method", "str", "--raw-threshold-init", "nan"], "--raw-threshold-init nan"),
        (["--lr", "-1"], "--lr -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--workers", "-1"], "--workers -1"),
        (["--model", "vgg"], "no model vgg .. resnet-digits"),
        (["--model", "resnet21"], "no model resnet21 .. resnet20"),
        (["--data", "cifar"], "'cifar'"),
        (["fashion-mnist", "--data-dir", "nowhere"], "nowhere"),
        (["fashion-mnist"], "--data-dir"),
        (["--data", "imagefolder:empty"], "empty"),
        (["--amp", "fp16"], "--amp fp16 .. GPU"),
        (["--resume"], "no run in .. runs/run"),
        (["--device", "abacus"], "--device"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    device = [] if "--device" in args else ["--device", "cpu"]
    assert run(*args, *device, "--run-dir", "runs/run") == 2
    output = capsys.readouterr()
    assert holds(output.err, message)
    assert output.err.startswith("error: ") == (output.err.count("\n") == 1)  # else the parser's box
    assert "Traceback" not in output.err
    assert os.listdir() == ["empty"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vgg"], "no model vgg"),
        (["--pretrained", "gone.pth"], "gone.pth: No such file"),
        (["--pretrained", "notes"], "notes: .. file of weights"),
        (["--budget", "gone.json"], "gone.json"),
        (["resnet50-str-exact-90-finetune"], "name it with --pretrained"),
        (["--run-dir", "full"], "full is not empty"),
    ],
)
def test_what_is_wrong_is_said_before_the_images_are_read(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", lambda *args: pytest.fail("the images were read"))
    Path("full").mkdir()
    Path("full/notes").write_text("")
    Path("notes").write_text("no weights")
    assert run(*options, "--device", "cpu") == 2
    assert holds(capsys.readouterr().err, message)


@pytest.mark.parametrize("options", [("--batch-size", "1"), ("--batch-size", "8", "--accumulate", "8")])
def test_single_images_are_refused_where_batch_norm_cannot_take_them(
    tmp_path: Path, quick: None, options: tuple[str, ...], capsys: pytest.CaptureFixture
):
    assert begin(tmp_path / "run", *options, "--model", "resnet18") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --batch-size") == (error.count("\n") == 1)
    assert all(f"{option} {value}" in error for option, value in zip(options[::2], options[1::2], strict=True))
    assert "'layer2.0." in error
    assert os.listdir(tmp_path) == []


def test_single_images_are_trained_on_where_batch_norm_sees_planes(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "steps_per_epoch", lambda *args, **options: 3)
    monkeypatch.setattr(train, "batches", lambda *args, **options: itertools.islice(data.batches(*args, **options), 3))
    assert begin(tmp_path / "run", "--batch-size", "1") == 0


def test_a_network_that_takes_no_such_images(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def build(name: str, num_classes: int, in_channels: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(in_channels, num_classes, 9), torch.nn.Flatten())

    monkeypatch.setattr(train, "build", build)
    assert begin(tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith("error: --model resnet-digits: images of 8x8")


def test_the_process_ends_with_the_exit_code():
    command = [sys.executable, "cnn/train.py", "cifar"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 2
    assert holds(result.stderr, "no recipe cifar .. cifar10 .. python cnn/train.py --help")
    assert result.stderr.count("\n") == 1


def test_a_run_dir_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("mine")
    assert begin(tmp_path / "file" / "run") == 2
    assert "Not a directory" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_dir_with_a_run_is_refused(whole_run: Path, capsys: pytest.CaptureFixture):
    before = (whole_run / "summary.json").stat().st_mtime_ns
    assert begin(whole_run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (whole_run / "summary.json").stat().st_mtime_ns == before


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """From the eighth step on; the checkpoints are of steps 2, 4, 5 and 6."""
    monkeypatch.setattr(train, "learning_rate", lambda config, steps, step: float("nan") if step >= 7 else 0.01)
    assert begin(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert holds(error, "NaN or infinite by step 8 .. step-000000006.pt")
    assert error.count("\n") == 1
    assert torch.isfinite(last_checkpoint(tmp_path / "run")["model"]["head.weight"]).all()
    assert last_checkpoint(tmp_path / "run")["step"] == 6
