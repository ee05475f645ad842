"""The training program: its files and output, and one line for each error."""

import json
import os
from pathlib import Path

import pytest
import torch

from str_triton import RankBudget
from str_triton.rnn import data, train
from str_triton.rnn.models import load_trained
from str_triton.training.metrics import read_metrics
from tests.messages import holds
from tests.rnn.train_runs import RANK, begin, run, text_options
from tests.runs import last_checkpoint

SUMMARY = ["accuracy", "validation_accuracy", "ranks", "params", "dense_params", "epochs", "chosen_epoch", "seconds"]
SUMMARY += ["seed", "recipe"]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def accuracy_on_test(model: torch.nn.Module) -> float:
    test = data.load("japanese-vowels").test
    x, lengths, labels = test.batch(torch.arange(len(test)), augment=False, generator=torch.Generator(), device="cpu")
    return (model(x, lengths).argmax(1) == labels).double().mean().item()


def test_a_run_writes_everything(whole_run: Path):
    expected = {"budget.csv", "budget.json", "checkpoints", "config.json", "data.json", "environment.json", "events"}
    expected |= {"interface.json", "lock", "metrics.jsonl", "model.safetensors", "report.html", "summary.json"}
    assert {path.name for path in whole_run.iterdir()} == expected
    summary = summary_of(whole_run)
    assert list(summary) == SUMMARY
    assert (summary["epochs"], summary["chosen_epoch"], summary["seed"]) == (2, 2, 0)
    assert (summary["recipe"], summary["validation_accuracy"]) == ("japanese-vowels-gru", None)
    assert sum(summary["ranks"].values()) == 10
    budget = RankBudget.from_json(whole_run / "budget.json")
    assert budget == RankBudget.from_csv(whole_run / "budget.csv")
    assert (summary["params"], summary["dense_params"]) == (budget.params, budget.dense_params)
    assert {row.name: row.rank for row in budget.rows} == summary["ranks"]
    epochs = [record for record in read_metrics(whole_run) if record["kind"] == "epoch"]
    assert [(record["epoch"], record["step"]) for record in epochs] == [(1, 5), (2, 10)]
    for record in epochs:
        assert sum(layer["rank"] for layer in record["layers"].values()) == record["total_rank"]
        for layer in record["layers"].values():
            assert layer["spectrum"] == sorted(layer["spectrum"], reverse=True)
            assert sum(value > layer["threshold"] for value in layer["spectrum"]) == layer["rank"]
    assert "Spectra over time" in (whole_run / "report.html").read_text()
    assert "CC BY 4.0" in json.loads((whole_run / "data.json").read_text())["source"]


def test_the_saved_model_is_compact_and_has_the_measured_accuracy(whole_run: Path):
    model, summary = load_trained(whole_run), summary_of(whole_run)
    assert sum(parameter.numel() for parameter in model.parameters()) == summary["params"]
    assert accuracy_on_test(model) == pytest.approx(summary["accuracy"], abs=0.003)


@pytest.mark.parametrize("method", ["str-exact", "fixed", "svd-finetune"])
@pytest.mark.parametrize("target", [("--target-params", "600"), ("--target-compression", "1.4")])
def test_other_targets_are_met(tmp_path: Path, quick: None, method: str, target: tuple[str, str]):
    assert begin(tmp_path / "run", "--method", method, *target) == 0
    summary = summary_of(tmp_path / "run")
    if target[0] == "--target-params":
        step = 136 if method == "fixed" else 60  # parameters that one more rank costs, in all four matrices or in one
        assert 600 - step < summary["params"] <= 600
    else:
        assert 1.4 <= summary["dense_params"] / summary["params"] < 1.55
    assert sum(p.numel() for p in load_trained(tmp_path / "run").parameters()) == summary["params"]


@pytest.mark.parametrize("method", ["fixed", "svd-finetune"])
def test_baselines_meet_a_rank(tmp_path: Path, quick: None, method: str, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"
    assert begin(folder, "--method", method, *RANK) == 0
    ranks = summary_of(folder)["ranks"]
    if method == "fixed":
        assert list(ranks.values()) == [2, 2, 2, 2]
        assert holds(capsys.readouterr().err, "--target-rank 10 .. total rank is 8")
    else:
        assert sum(ranks.values()) == 10
        first, second = (record for record in read_metrics(folder) if record["kind"] == "epoch")
        assert first["layers"] == {}
        assert {name: layer["rank"] for name, layer in second["layers"].items()} == ranks
    assert accuracy_on_test(load_trained(folder)) == pytest.approx(summary_of(folder)["accuracy"], abs=0.003)


@pytest.mark.parametrize("method", ["fixed", "svd-finetune"])
def test_baselines_take_given_ranks(tmp_path: Path, quick: None, method: str):
    folder = tmp_path / "run"
    assert begin(folder, "--method", method, "--ranks", "2,3") == 0
    assert list(summary_of(folder)["ranks"].values()) == [2, 3, 2, 3]


@pytest.mark.parametrize("method", ["dense", "str"])
def test_methods_without_a_target(tmp_path: Path, quick: None, method: str, capsys: pytest.CaptureFixture):
    decay = ["--spectrum-decay", "0.01"] if method == "str" else []
    assert begin(tmp_path / "run", "--method", method, *decay) == 0
    said = capsys.readouterr().out.split("\nmatrix ")[0]
    assert ("  rank " in said) == (method == "str")  # a dense network has no rank
    opening = dict(line.split(maxsplit=1) for line in said.splitlines()[:5])
    assert list(opening) == ["data", "model", "target", "device", "folder"]
    assert all(figure in opening["data"] for figure in ("japanese-vowels", "270", "370", "12 numbers", "9 classes"))
    size = summary_of(tmp_path / "run")["dense_params"]
    assert all(figure in opening["model"] for figure in ("gru", "8 units", "both directions", f"{size:,}"))
    assert method in opening["target"]
    state = last_checkpoint(tmp_path / "run")
    assert state["controller"] is None
    raws = [value for name, value in state["model"].items() if name.endswith("raw_threshold")]
    assert len(raws) == (4 if method == "str" else 0)
    assert all(raw.item() > -10.0 for raw in raws)  # weight decay has moved them towards 0
    summary = summary_of(tmp_path / "run")
    assert method == "str" or (summary["ranks"], summary["params"]) == ({}, summary["dense_params"])
    assert accuracy_on_test(load_trained(tmp_path / "run")) == pytest.approx(summary["accuracy"], abs=0.003)


def test_the_chosen_epoch_is_the_best_on_validation_data_among_those_at_the_target(tmp_path: Path, quick: None):
    folder = tmp_path / "run"
    options = ["--epochs", "10", "--choose", "validation", "--lr", "0.02", *RANK]
    assert begin(folder, *options) == 0
    epochs = [record for record in read_metrics(folder) if record["kind"] == "epoch"]
    # Epochs are measured at the schedule's exact value, although training solves only every twentieth step.
    assert [record["total_rank"] for record in epochs[:2]] == [30, 20]
    candidates = [record for record in epochs if record["epoch"] >= 3]
    best = max(candidates, key=lambda record: (record["accuracy"], record["epoch"]))
    summary = summary_of(folder)
    assert (summary["chosen_epoch"], summary["validation_accuracy"]) == (best["epoch"], best["accuracy"])
    assert all(record["total_rank"] == 10 for record in candidates)
    assert sum(summary["ranks"].values()) == 10
    assert {row.name: row.rank for row in RankBudget.from_json(folder / "budget.json").rows} == summary["ranks"]
    assert accuracy_on_test(load_trained(folder)) == pytest.approx(summary["accuracy"], abs=0.003)


@pytest.mark.parametrize("cell", ["lstm", "fastgrnn"])
def test_other_cells_and_several_layers(tmp_path: Path, quick: None, cell: str):
    assert begin(tmp_path / "run", "--cell", cell, "--layers", "2", "--target-rank", "20") == 0
    summary = summary_of(tmp_path / "run")
    assert len(summary["ranks"]) == 8
    assert sum(summary["ranks"].values()) == 20
    assert accuracy_on_test(load_trained(tmp_path / "run")) == pytest.approx(summary["accuracy"], abs=0.003)


def test_a_language_model_is_measured_in_bits_per_character(tmp_path: Path):
    folder = tmp_path / "run"
    assert begin(folder, *text_options(tmp_path), "--lr", "0.02", "--epochs", "3") == 0
    summary = summary_of(folder)
    assert list(summary)[:2] == ["bits_per_character", "validation_bits_per_character"]
    assert 2.0 < summary["bits_per_character"] < 5.5
    epochs = [record for record in read_metrics(folder) if record["kind"] == "epoch"]
    assert epochs[0]["bits_per_character"] > epochs[-1]["bits_per_character"]
    assert summary["validation_bits_per_character"] == epochs[-1]["bits_per_character"]
    assert summary["dense_params"] / summary["params"] >= 1.2
    model = load_trained(folder)
    text = data.load(f"text:{tmp_path / 'text.txt'}", task="lm").test
    streams = text[: len(text) // 4 * 4].view(4, -1)
    with torch.no_grad():
        scores, _ = model(streams[:, :-1])
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), streams[:, 1:].flatten()) / torch.tensor(2.0).log()
    assert loss.item() == pytest.approx(summary["bits_per_character"], abs=1e-4)
    assert "Bits per character" in (folder / "report.html").read_text()


# Wrong input of users.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["vowels"], "no recipe vowels .. japanese-vowels-gru"),
        (["cifar10"], "python cnn/train.py cifar10"),
        (["resnet50"], "python cnn/train.py has resnet50-"),
        (["--target-rank", "1000"], "216"),
        (["--method", "fixed", "--target-rank", "1000"], "216"),
        (["--target-rank", "3"], "--target-rank .. 4"),
        (["--method", "svd-finetune", "--target-rank", "3"], "4"),
        (["--target-rank", "0"], "--target-rank 0"),
        (["--target-params", "10"], "--target-params .. 4257 to 65097"),
        (["--target-compression", "0.5"], "--target-compression 0.5"),
        (["--target-compression", "nan"], "--target-compression nan"),
        (["--target-compression", "1000"], "--target-compression .. 1.0 to 15.2917"),
        (["--target-params", "9000", "--target-rank", "20"], "choose one"),
        (["--method", "str", "--target-rank", "20"], "--target-rank 20: --method str "),
        (["--method", "dense", "--target-params", "20"], "--target-params 20: --method dense "),
        (["--method", "svd-finetune", "--epochs", "1"], "--epochs 1"),
        (["--batch-size", "2000"], "batch size 2000 .. 270 training sequences"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--dropout", "1"], "--dropout 1"),
        (["--noise", "-1"], "--noise -1"),
        (["--hidden-size", "0"], "--hidden-size 0"),
        (["--hidden-size", str(10**17)], f"--hidden-size {10**17} .. memory"),
        (["--data", "japanese"], "did you mean japanese-vowels?"),
        (["--data", "har:nowhere"], "nowhere"),
        (["har2-fastgrnn"], "--data is missing: .. har:DIR"),
        (["speech5-gru"], "--data is missing: .. hub:DIR"),
        (["--data", "speech-commands:empty"], "empty"),
        (["--data", "text:nowhere.txt"], "nowhere.txt"),
        (["--data", "text:latin.txt"], "latin.txt"),
        (["--data", "text:short.txt"], "short.txt"),
        (["--data", "text", "--batch-size", "100000"], "batch size of 100000"),
        (["--data", "text", "--bidirectional"], "--bidirectional"),
        (["--data", "text", "--noise", "0.5"], "noise 0.5"),
        (["--task", "lm"], "--task lm"),
        (["--words", "yes,no"], "not for 'japanese-vowels'"),
        (["--data", "har:empty", "--words", "yes,no"], "not for 'har:empty'"),
        (["--classes", "2"], "har:PATH, not for 'japanese-vowels'"),
        (["--cell", "elman"], "--cell"),
        (["--workers", "2"], "--workers"),
        (["--resume"], "there is no run in"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("latin.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 1000)
    Path("short.txt").write_text("too short")
    assert run(*args, "--device", "cpu", "--run-dir", "runs/run") == 2
    output = capsys.readouterr()
    assert holds(output.err, message)
    assert output.err.startswith("error: ") == (output.err.count("\n") == 1)  # otherwise it is the parser's box
    assert "Traceback" not in output.err
    assert sorted(os.listdir()) == ["empty", "latin.txt", "short.txt"]


def test_features_that_are_not_numbers_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Check that the data set's error becomes one line and exit code 2."""
    monkeypatch.setattr(
        "str_triton.rnn.data.japanese_vowels.np.loadtxt", lambda *args, **kwargs: [[1.0, 1.0, float("nan")]]
    )
    monkeypatch.setattr("str_triton.rnn.data.japanese_vowels.torch.from_numpy", torch.tensor)
    assert begin(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Make the loss NaN from step 8 on; the checkpoints are those of steps 2, 4, 5 and 6."""
    monkeypatch.setattr(train, "learning_rate", lambda config, steps, step: float("nan") if step >= 7 else 0.01)
    assert begin(tmp_path / "run", *RANK) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the loss became NaN or infinite by step 8; the last good checkpoint is ")
    assert error.count("\n") == 1
    assert last_checkpoint(tmp_path / "run")["step"] == 6
