"""The training program from outside: what it writes, what it refuses, and that a killed run ends in the same bits."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState

from cnn import data, train
from cnn.models import build
from str_triton import Budget, count, sparsify
from str_triton.training.checkpoints import Checkpoints
from str_triton.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TINY = ["--epochs", "2", "--batch-size", "256", "--checkpoint-steps", "2", "--device", "cpu"]  # 2 x 5 steps
SUMMARY = ["accuracy", "sparsity", "nonzeros", "params", "flops", "dense_flops", "epochs", "seconds", "seed", "recipe"]


class Killed(BaseException):
    """Ends a run where it stands, as kill -9 does: nothing catches it."""


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Undo what a run sets for its whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*TINY, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take longer than the training here."""
    monkeypatch.setattr(train, "report", lambda folder: "")


def last_checkpoint(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints").glob("*.pt")), weights_only=True)


def same_bits(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def assert_same_result(folder: Path, whole: Path) -> None:
    ours, theirs = last_checkpoint(folder), last_checkpoint(whole)
    for key in ("step", "model", "optimizer", "controller"):
        assert same_bits(ours[key], theirs[key]), key
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (folder / "budget.csv").read_text() == (whole / "budget.csv").read_text()
    ours, theirs = ([{**record, "seconds": 0} for record in read_metrics(place)] for place in (folder, whole))
    assert ours == theirs


def after_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, act: Callable) -> None:
    """Call ``act`` when ``owner.name`` is called for the ``number``-th time, before it does its work."""
    original, calls = getattr(owner, name), 0

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def kill() -> None:
    raise Killed


def resume(folder: Path, *options: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train.main([*options, "--resume", "--run-dir", str(folder)])


def test_a_run_writes_everything(whole_run: Path):
    expected = {"budget.csv", "budget.json", "checkpoints", "config.json", "environment.json", "events", "lock"}
    expected |= {"metrics.jsonl", "model.safetensors", "report.html", "summary.json"}
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
    assert (config["target_sparsity"], config["gradient"], config["method"]) == (0.9, "straight_through", "str-exact")
    assert json.loads((whole_run / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_the_saved_model_is_dense_and_has_the_measured_accuracy(whole_run: Path):
    model = build("resnet-digits", num_classes=10, in_channels=1)
    model.load_state_dict(safetensors.torch.load_file(whole_run / "model.safetensors"))
    test = data.load("digits").test
    images, labels = test.batch(torch.arange(len(test)), seed=0, epoch=0, augment=False)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert (model.eval()(images).argmax(1) == labels).double().mean() == pytest.approx(summary["accuracy"], abs=0.003)
    assert count(model, images[:1]).nonzeros == summary["nonzeros"]


def test_evaluation_and_checkpoints_see_the_schedules_exact_value(whole_run: Path):
    """With ten steps the thresholds of training itself are solved for at the first and the last alone."""
    first = next(record for record in read_metrics(whole_run) if record["kind"] == "epoch")
    assert first["sparsity"] == pytest.approx(0.9 * (1 - (1 - 0.5 / 0.7) ** 3), abs=2e-5)
    state = torch.load(whole_run / "checkpoints" / "step-000000008.pt", weights_only=True)
    model = sparsify(build("resnet-digits", num_classes=10, in_channels=1))
    model.load_state_dict(state["model"])
    assert count(model, torch.zeros(1, 1, 8, 8)).sparsity == pytest.approx(0.9, abs=2e-5)


def test_a_flop_target_is_a_share_of_dense(tmp_path: Path, quick: None):
    assert train.main([*TINY, "--target-flops", "0.1", "--run-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["flops"] == pytest.approx(0.1 * summary["dense_flops"], rel=1e-3)


@pytest.mark.parametrize("method", ["dense", "str"])
def test_methods_without_a_target(tmp_path: Path, quick: None, method: str, capsys: pytest.CaptureFixture):
    assert train.main([*TINY, "--method", method, "--run-dir", str(tmp_path / "run")]) == 0
    assert "nothing will be pruned" not in capsys.readouterr().err
    state = last_checkpoint(tmp_path / "run")
    assert state["controller"] is None
    raws = [value for name, value in state["model"].items() if name.endswith("raw_threshold")]
    assert len(raws) == (7 if method == "str" else 0)
    assert all(raw.item() > -5.0 for raw in raws)  # weight decay has drawn them towards 0


def test_thresholds_that_will_not_arrive_are_warned_of(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture):
    args = [*TINY, "--method", "str", "--raw-threshold-init", "-3200", "--run-dir", str(tmp_path / "run")]
    assert train.main(args) == 0
    assert "nothing will be pruned: weight decay takes the raw thresholds from -3200 to -31" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["sparsity"] == 0.0


@pytest.mark.parametrize(
    ("option", "values"), [("--granularity", ("global", "filter")), ("--distribution", ("flop-aware", "learned"))]
)
def test_other_thresholds_meet_the_target_too(tmp_path: Path, quick: None, option: str, values: tuple[str, str]):
    for value in values:
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / value
        assert train.main([*TINY, option, value, "--run-dir", str(folder)]) == 0
        assert abs(json.loads((folder / "summary.json").read_text())["sparsity"] - 0.9) <= 1e-4


# What a person can get wrong.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cifar"], "there is no recipe 'cifar'; the recipes are digits, fashion-mnist"),
        (["--target-sparsity", "1.2"], "--target-sparsity 1.2"),
        (["--distribution", "learned", "--method", "dense"], "--distribution learned needs --method str-exact"),
        (["--target-sparsity", "-0.1"], "--target-sparsity -0.1"),
        (["--target-sparsity", "nan"], "--target-sparsity nan"),
        (["--target-flops", "1.2"], "--target-flops 1.2"),
        (["--target-flops", "0.00001"], "cannot be met"),
        (["--target-sparsity", "0.99999"], "cannot be met"),
        (["--target-flops", "0.1", "--target-sparsity", "0.9"], "choose one"),
        (["--method", "str", "--target-sparsity", "0.9"], "--target-sparsity 0.9: --method str meets no target"),
        (["--method", "dense", "--target-flops", "0.9"], "--target-flops 0.9: --method dense meets no target"),
        (["--batch-size", "2000"], "batch size 2000 is larger than the 1438 training images"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--epochs", "0"], "--epochs 0"),
        (["--lr", "-1"], "--lr -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--workers", "-1"], "--workers -1"),
        (["--model", "vgg"], "there is no model 'vgg'"),
        (["--data", "cifar"], "unknown data set 'cifar'"),
        (["fashion-mnist", "--data-dir", "nowhere"], "nowhere"),
        (["fashion-mnist"], "--data-dir"),
        (["--data", "imagefolder:empty"], "empty"),
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--resume"], "there is no run in"),
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
    assert train.main([*args, *device, "--run-dir", "runs/run"]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("error: ") == (output.err.count("\n") == 1)  # else the parser's box
    assert "Traceback" not in output.err
    assert os.listdir() == ["empty"]


def test_a_run_dir_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("mine")
    assert train.main([*TINY, "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be made: Not a directory" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_dir_with_a_run_is_refused(whole_run: Path, capsys: pytest.CaptureFixture):
    before = (whole_run / "summary.json").stat().st_mtime_ns
    assert train.main([*TINY, "--run-dir", str(whole_run)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (whole_run / "summary.json").stat().st_mtime_ns == before


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """From the eighth step on; the checkpoints are of steps 2, 4, 5 and 6."""
    monkeypatch.setattr(train, "learning_rate", lambda config, steps, step: float("nan") if step >= 7 else 0.01)
    assert train.main([*TINY, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the loss became NaN or infinite by step 8; the last good checkpoint is ")
    assert error.count("\n") == 1
    assert torch.isfinite(last_checkpoint(tmp_path / "run")["model"]["head.weight"]).all()
    assert last_checkpoint(tmp_path / "run")["step"] == 6


# Killed, interrupted, resumed.


@pytest.mark.parametrize(("owner", "name", "number"), [(os, "replace", 3), (os, "fsync", 12), (Checkpoints, "save", 3)])
def test_a_run_killed_while_it_writes_ends_in_the_same_bits(
    tmp_path: Path, quick: None, whole_run: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int
):
    with monkeypatch.context() as patch:
        after_calls(patch, owner, name, number, kill)
        with pytest.raises(Killed):
            train.main([*TINY, "--run-dir", str(tmp_path / "run")])
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
        assert train.main([*TINY, "--run-dir", str(folder)]) == code
    assert capsys.readouterr().err == (
        f"stopped after step {step}, which is saved; go on with: python cnn/train.py --resume --run-dir {folder}\n"
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
        train.main([*TINY, "--run-dir", str(folder)])
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
            assert train.main([*TINY, "--run-dir", str(folder)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "cannot be written: File too large; the last whole one is" in error
    assert error.count("\n") == 1
    assert last_checkpoint(folder)["step"] == 5
    assert resume(folder) == 0
    assert_same_result(folder, whole_run)


@pytest.mark.parametrize("change", [["--seed", "1"], ["fashion-mnist"], ["--epochs", "3"], ["--method", "dense"]])
def test_resume_with_other_options_is_refused(whole_run: Path, change: list[str], capsys: pytest.CaptureFixture):
    assert resume(whole_run, *change) == 2
    assert "an option that alters the result cannot change on the way" in capsys.readouterr().err


def test_resume_of_a_finished_run_writes_the_end_again(whole_run: Path, quick: None):
    summary = (whole_run / "summary.json").read_text()
    assert resume(whole_run) == 0
    assert (whole_run / "summary.json").read_text() == summary
    assert len(json.loads((whole_run / "environment.json").read_text())["resumed"]) == 1


def test_workers_and_checkpoints_do_not_change_the_result(tmp_path: Path, quick: None, whole_run: Path):
    folder = tmp_path / "run"
    args = [*TINY[:-4], "--workers", "2", *TINY[-2:], "--run-dir", str(folder)]
    assert train.main(args) == 0
    assert_same_result(folder, whole_run)
