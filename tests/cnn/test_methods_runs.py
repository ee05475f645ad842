"""The methods through the training program: what a run of each leaves, budget transfer, resuming, and bad input."""

import json
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from str_triton import Budget
from str_triton.cnn import train
from str_triton.cnn.config import TAKEN_BY
from str_triton.cnn.methods import MASKED
from str_triton.cnn.models import build
from tests.cnn.train_runs import begin, resume, run
from tests.messages import holds
from tests.runs import after_calls, assert_same_result

LAYERS = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.shortcut.0", "head"]
TARGETED = ["str-exact", *MASKED]
INTERVAL = dict.fromkeys(TAKEN_BY["mask_interval"], ("--mask-interval", "2"))


def table(**changes: float) -> dict[str, float]:
    return dict.fromkeys(LAYERS, 80.0) | changes


@pytest.mark.parametrize("method", MASKED)
def test_a_run_meets_the_target_in_what_it_leaves(method: str, tmp_path: Path):
    """The report included."""
    folder = tmp_path / "run"
    assert begin(folder, "--method", method, *INTERVAL.get(method, ())) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["nonzeros"] == 76704 - round(0.9 * 76704)
    assert Budget.from_csv(folder / "budget.csv").nonzeros == summary["nonzeros"]
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert sum(int(weights[f"{name}.weight"].count_nonzero()) for name in LAYERS) == summary["nonzeros"]
    assert f"method {method}" in (folder / "report.html").read_text()
    assert summary["accuracy"] > 0.1


@pytest.mark.parametrize("method", TARGETED)
def test_the_budget_of_a_run_transfers(method: str, whole_run: Path, tmp_path: Path, quick: None):
    """From its folder and from either of its files."""
    source = {"gmp": whole_run, "rigl": whole_run / "budget.csv"}.get(method, whole_run / "budget.json")
    assert begin(tmp_path / "run", "--method", method, "--budget", str(source)) == 0
    ours, theirs = (Budget.from_json(folder / "budget.json") for folder in (tmp_path / "run", whole_run))
    assert [row.nonzeros for row in ours.rows] == [row.nonzeros for row in theirs.rows]


@pytest.mark.parametrize("kind", ["json", "csv", "spreadsheet"])
def test_a_budget_of_ones_own(kind: str, tmp_path: Path, quick: None):
    file, shares = tmp_path / "own", table(stem=0, head=62.5)
    lines = [f"{name},{share}" for name, share in shares.items()]
    spreadsheet = "\ufefflayer,sparsity %\r\n" + "\r\n".join(lines) + "\r\n\r\n"
    file.write_text({"json": json.dumps(shares), "csv": "\n".join(lines), "spreadsheet": spreadsheet}[kind])
    assert begin(tmp_path / "run", "--method", "gmp", "--budget", str(file), "--epochs", "1") == 0
    rows = {row.name: row for row in Budget.from_json(tmp_path / "run" / "budget.json").rows if row.params}
    zeros = {name: round(share / 100 * rows[name].params) for name, share in shares.items()}
    assert {name: row.params - row.nonzeros for name, row in rows.items()} == zeros


@pytest.mark.parametrize("method", MASKED)
def test_an_interrupted_run_ends_in_the_same_bits(
    method: str, tmp_path: Path, quick: None, small: list[str], monkeypatch: pytest.MonkeyPatch
):
    options = [*small, "--method", method, *INTERVAL.get(method, ())]
    assert begin(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert begin(tmp_path / "run", *options) == 143
    assert resume(tmp_path / "run") == 0
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_the_zeros_of_a_pruned_network_stay(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    """Also where the run was interrupted, and the file is gone by then."""
    state = build("resnet-digits", num_classes=10, in_channels=1).state_dict()
    zeros = {f"{name}.weight": torch.rand_like(state[f"{name}.weight"]) < 0.7 for name in LAYERS}
    for name, where in zeros.items():
        state[name][where] = 0.0
    file = tmp_path / "pruned.pth"
    torch.save(state, file)
    options = ["--method", "keep-zeros", "--pretrained", str(file)]
    assert begin(tmp_path / "whole", *options) == 0
    weights = safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(weights[name] == 0, where) for name, where in zeros.items())
    assert not torch.equal(weights["head.weight"], state["head.weight"])
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert begin(tmp_path / "run", *options) == 143
    file.unlink()
    assert resume(tmp_path / "run") == 0
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_a_network_without_zeros_has_none_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save(build("resnet-digits", num_classes=10, in_channels=1).state_dict(), tmp_path / "dense.pth")
    for options, message in (
        ([], "--pretrained FILE"),
        (["--pretrained", str(tmp_path / "dense.pth")], "no weight in"),
    ):
        assert begin(tmp_path / "run", "--method", "keep-zeros", *options) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_a_budget_that_changes_on_the_way_is_refused(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    file = tmp_path / "budget.json"
    file.write_text(json.dumps(table()))
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert begin(tmp_path / "run", "--budget", str(file)) == 143
    file.write_text(json.dumps(table(stem=70.0)))
    capsys.readouterr()
    assert resume(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "another target by layer" in error
    assert error.count("\n") == 1


# What a person can get wrong.

BUDGETS = {
    "missing.json": (json.dumps(dict.fromkeys(LAYERS[:-1], 80)), "the model's layer 'head' is missing"),
    "unknown.json": (json.dumps(table(tail=10)), "the model has no layer 'tail'"),
    "above.json": (json.dumps(table(head=100.5)), "layer 'head': a sparsity of 100.5 % is outside 0 to 100"),
    "below.csv": ("\n".join(f"{k},{v}" for k, v in table(stem=-1).items()), "a sparsity of -1 % is outside 0 to 100"),
    "shares.json": (
        json.dumps(table(**dict.fromkeys(LAYERS, 0.9))),
        "no layer .. more than 0.9 % .. write 90, not 0.9",
    ),
    "nan.json": (json.dumps(table(head=float("nan"))), "a sparsity of nan % is outside 0 to 100"),
    "word.json": (json.dumps(table() | {"head": "most"}), "layer 'head': expected a sparsity in %, got 'most'"),
    "true.json": (json.dumps(table() | {"head": True}), "expected a sparsity in %, got True"),
    "twice.json": ('{"stem": 1, "stem": 2}', "layer 'stem' is named twice"),
    "twice.csv": ("stem,1\nstem,2\n", "layer 'stem' is named twice"),
    "list.json": ("[1, 2]", "expected an object of layers"),
    "half.json": ('{"stem": 1', "not a budget in JSON"),
    "prose.csv": ("some words " * 50 + "\n", "words some words some [...]\n"),
    "one.csv": ("stem\n", "expected two columns, layer and sparsity in %, got ['stem']"),
    "empty.csv": ("", "got nothing"),
    "three.csv": ("a,b,c\n", "no column 'name'"),
    "picture.csv": (b"\xff\xfe\x00", "not a text file"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_bad_budget_is_one_line_and_exit_code_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    content, message = BUDGETS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    expect_one_line(["--method", "gmp", "--budget", str(tmp_path / name)], [message, name], tmp_path, capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "snip"], "--method snip .. str-exact or str or gmp or dnw"),
        (["--budget", "nowhere.csv"], "nowhere.csv: No such file"),
        (["--budget", "."], "--budget . .. finished run .. summary.json"),
        (["--budget", "b.csv", "--target-sparsity", "0.9"], "--target-sparsity .. --budget .. choose one"),
        (["--budget", "b.csv", "--method", "dense"], "--budget b.csv .. --method dense .. no target"),
        (["--budget", "b.csv", "--method", "str"], "--budget b.csv .. --method str .. no target"),
        (["--budget", "b.csv", "--distribution", "learned"], "--distribution learned .. --budget"),
        (["--budget", "b.csv", "--granularity", "global"], "--granularity global .. --budget"),
        (["--method", "gmp", "--target-flops", "0.1"], "--target-flops 0.1 .. --method gmp .. --target-sparsity"),
        (["--method", "gmp", "--distribution", "fixed"], "--method gmp .. uniform, erk, global"),
        (["--method", "rigl", "--distribution", "global"], "--method rigl .. erk, uniform"),
        (["--distribution", "erk"], "--method str-exact .. fixed, flop-aware, learned"),
        (["--distribution", "learned", "--granularity", "global"], "--distribution learned .. --granularity global"),
        (
            ["--method", "dnw", "--mask-interval", "5"],
            "--mask-interval 5 .. --method dnw does not take it .. gmp and",
        ),
        (
            ["--method", "gmp", "--gradient", "masked"],
            "--gradient masked .. --method gmp does not take it",
        ),
        (["--method", "rigl", "--granularity", "layer"], "--granularity layer .. --method rigl does not take it"),
        (["--method", "dense", "--granularity", "filter"], "--granularity filter .. --method dense does not take it"),
        (
            ["--raw-threshold-init", "-9"],
            "--raw-threshold-init -9.0 .. --method str-exact does not take it",
        ),
        (["--method", "gmp", "--mask-interval", "0"], "--mask-interval 0 .. at least 1"),
        (["--method", "dnw", "--target-sparsity", "0.99999"], "1 of 76,704 weights"),
        (["--method", "gmp", "--distribution", "global", "--target-sparsity", "0.99999"], "cannot be met"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    expect_one_line(args, [message], tmp_path, capsys)


def expect_one_line(args: list[str], parts: list[str], folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(*args, "--device", "cpu", "--run-dir", str(folder / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(holds(error, part) for part in parts), error
    assert not (folder / "run").exists()
