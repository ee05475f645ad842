"""`python -m str_triton.rnn.export`: its files and output, and one line for each error."""

import builtins
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from str_triton import deploy
from str_triton.rnn import onnx_export
from str_triton.rnn.export import main
from str_triton.rnn.finished_run import open_run
from str_triton.rnn.models import load_trained
from tests.messages import holds


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run the program, which must exit with 2; return its one line on standard error."""
    assert main([str(argument) for argument in args]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_run_knows_what_stands_around_its_network(whole_run: Path) -> None:
    run = open_run(whole_run)
    assert run.outputs == tuple(f"speaker {number}" for number in range(1, 10))
    assert run.mean.shape == run.std.shape == (12,)
    assert run.mean.abs().max() > 0.01  # the file's coefficients are not standardised
    assert run.name == "bidirectional GRU, 8 units, trained on japanese-vowels"


def test_c(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["c", str(whole_run), str(tmp_path / "deep" / "speakers"), "--weights", "int8"]) == 0
    assert sorted(path.name for path in (tmp_path / "deep" / "speakers").iterdir()) == ["speakers.c", "speakers.h"]
    out = capsys.readouterr().out
    assert re.search(
        r"^flash: [\d,]+ bytes \([\d,]+ of weights, .* RAM: 64 bytes of state, \d+ of arrays .*-fstack-usage\)$",
        out,
        re.M,
    )
    assert "speakers_step_back" in (tmp_path / "deep" / "speakers" / "speakers.h").read_text()


def test_a_language_model_has_no_c(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(open_run(whole_run), config={"task": "lm"})
    monkeypatch.setattr("str_triton.rnn.export.open_run", lambda folder: run)
    assert f"{whole_run} is a language model" in refused(capsys, "c", whole_run, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "export", "form"),
    [(["--steps", "5"], "sequences", "sequences of 5 steps"), (["--streaming"], "one_step", "one step")],
)
def test_onnx(
    options: list[str],
    export: str,
    form: str,
    whole_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exports themselves are tested in test_onnx_export.py."""
    monkeypatch.setattr(onnx_export, export, lambda run, *steps: deploy.OnnxFile(f"{steps}".encode(), 2.5e-7))
    assert main(["onnx", str(whole_run), str(tmp_path / "x.onnx"), *options]) == 0
    content = "(5,)" if export == "sequences" else "()"
    assert holds(capsys.readouterr().out, f"{form}, {len(content)} bytes .. onnxruntime .. 2.5e-07")
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    assert (tmp_path / "x.onnx").read_text() == content


def test_onnx_without_its_libraries(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "onnx":
            raise ModuleNotFoundError("blocked", name="onnx")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    line = refused(capsys, "onnx", whole_run, tmp_path / "x.onnx")
    assert "onnx" in line
    assert "pip install 'str-triton[onnx]'" in line


def test_pack(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(whole_run), str(tmp_path / "speakers.safetensors")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speakers.md", "speakers.safetensors"]
    state = deploy.unpack(tmp_path / "speakers.safetensors", factors=True)
    trained = load_trained(whole_run).state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], trained[name]) for name in trained)
    card = (tmp_path / "speakers.md").read_text()
    assert "rnn.weight_hh_l0_reverse" in card
    assert "the inputs' standardisation" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace(
        "speakers.safetensors", f"{tmp_path}/speakers.safetensors"
    )
    names: dict = {}
    exec(code, names)
    x = torch.randn(2, 5, 12)
    assert torch.equal(names["model"](x), load_trained(whole_run)(x))


def test_the_card_names_no_standardisation_where_there_is_none(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(open_run(whole_run), mean=None, std=None)
    monkeypatch.setattr("str_triton.rnn.export.open_run", lambda folder: run)
    assert main(["pack", str(whole_run), str(tmp_path / "x.safetensors")]) == 0
    assert "standardisation" not in (tmp_path / "x.md").read_text()


def test_bad_input_is_one_line(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused(capsys, "c", tmp_path / "none", out)
    assert "has no config.json" in refused(capsys, "c", tmp_path, out)
    assert "--weights int4" in refused(capsys, "c", whole_run, out, "--weights", "int4")
    assert holds(refused(capsys, "onnx", whole_run, out, "--steps", "0"), "--steps 0 .. at least 1")
    assert "a bidirectional network cannot" in refused(capsys, "onnx", whole_run, out, "--streaming")
    assert "not allowed with" in refused(capsys, "onnx", whole_run, out, "--streaming", "--steps", "3")
    assert holds(refused(capsys, "pack", whole_run, tmp_path / "x.md"), "x.md .. model card")
    assert "missing: TARGET" in refused(capsys)
    assert "No such file" in refused(capsys, "pack", whole_run, tmp_path / "none" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run_is_one_line(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("checkpoints", "events"))
    summary = json.loads((run / "summary.json").read_text())
    for content, fault in (("{}", "'recipe'"), ("[]", "list"), (json.dumps(summary | {"params": "x"}), "'s'")):
        (run / "summary.json").write_text(content)
        line = refused(capsys, "pack", run, tmp_path / "x.safetensors")
        assert holds(line, f"{run / 'summary.json'} .. damaged .. {fault}")
    (run / "interface.json").unlink()
    assert holds(refused(capsys, "c", run, tmp_path / "out"), f"{run} .. interface.json .. not finished")
    (run / "interface.json").write_text(json.dumps({"outputs": ["a"]}))
    assert holds(refused(capsys, "c", run, tmp_path / "out"), "'outputs' and 'standardisation'")
    (run / "interface.json").write_text(json.dumps({"outputs": ["a"], "standardisation": None}))
    assert holds(refused(capsys, "c", run, tmp_path / "out"), "damaged .. 9 scores .. 1 names")
    numbers = {"outputs": list("abcdefghi"), "standardisation": {"mean": [0.0] * 12, "std": [1.0] * 11 + [0.0]}}
    (run / "interface.json").write_text(json.dumps(numbers))
    assert holds(refused(capsys, "c", run, tmp_path / "out"), "deviations .. 12 numbers")
    (run / "interface.json").write_text(json.dumps({"outputs": [1] * 9, "standardisation": None}))
    assert "the names of its scores" in refused(capsys, "c", run, tmp_path / "out")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(json.dumps(json.loads(config) | {"data": 5}))
    assert holds(refused(capsys, "c", run, tmp_path / "out"), "damaged .. data is 5 .. text")
    (run / "config.json").write_text(config)
    save_file({"x": torch.zeros(1)}, run / "model.safetensors")
    assert "damaged" in refused(capsys, "c", run, tmp_path / "out")


def test_weights_that_are_no_numbers_are_refused(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("checkpoints", "events"))
    with safe_open(run / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = load_file(run / "model.safetensors")
    weights["classifier.bias"][0] = torch.inf
    save_file(weights, run / "model.safetensors", metadata)
    assert holds(refused(capsys, "c", run, tmp_path / "out"), f"{run} .. 'classifier.bias' .. infinite")


def test_an_interface_that_is_not_the_weights_own_is_refused(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("checkpoints", "events"))
    record = json.loads((run / "interface.json").read_text())
    (run / "interface.json").write_text(json.dumps(record | {"outputs": record["outputs"][::-1]}))
    assert holds(refused(capsys, "c", run, tmp_path / "out"), f"{run} .. interface.json .. model.safetensors")
    with safe_open(run / "model.safetensors", "pt") as file:
        network = {"network": file.metadata()["network"]}
    save_file(load_file(run / "model.safetensors"), run / "model.safetensors", network)  # as older versions did
    assert open_run(run).outputs == tuple(record["outputs"][::-1])
