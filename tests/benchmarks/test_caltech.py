"""The study of fine-tuning: its order, its options, and what it measures of a network."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import caltech
from str_triton import count
from str_triton.cnn.models import build
from str_triton.cnn.recipes import RECIPES
from str_triton.cnn.train import COMMAND_LINE


def test_the_leaders_at_90_percent_come_first() -> None:
    keys = list(caltech.wanted())
    assert keys[:3] == [("dense", "", 0), ("str-exact", "0.9", 0), ("gmp, global", "0.9", 0)]
    assert {key.target for key in keys} == {"", "0.75", "0.9", "0.95", caltech.THIRD}
    assert {key.line for key in keys} == set(caltech.LINES)


def test_every_line_can_be_run_again() -> None:
    wanted = set(caltech.wanted())
    assert all(caltech.Key(*(run[name] for name in caltech.Key._fields)) in wanted for run in caltech.results().read())


def test_every_line_has_options_that_the_program_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caltech, "RESULTS", tmp_path)
    monkeypatch.setattr(caltech, "RUNS", tmp_path / "runs")
    after = [key for key in caltech.wanted() if key.line.endswith(caltech.BUDGET)]
    assert after
    with pytest.raises(ValueError, match="str-exact"):
        caltech.options_of(after[0])
    for key in after:
        source = caltech.Key("str-exact", key.target, key.seed)
        caltech.results().append(source._asdict() | {"density": {"fc": 0.25}})
    for key in caltech.wanted():
        arguments = ["mobilenetv1-finetune", "--data", "hub:x", "--pretrained", "x", *caltech.options_of(key)]
        config = COMMAND_LINE.read(arguments)
        assert config.recipe == "mobilenetv1-finetune"
        share, _, flops = key.target.partition(" ")
        if key in after:
            assert json.loads(Path(config.budget).read_text()) == {"fc": 75.0}
        elif key.target:
            assert (config.target_flops if flops else config.target_sparsity) == float(share)
    assert len({caltech._name(key) for key in caltech.wanted()}) == len(set(caltech.wanted()))


def test_a_missing_teacher_is_trained_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caltech, "RESULTS", tmp_path)
    monkeypatch.setattr(caltech, "RUNS", tmp_path / "runs")
    caltech.tuning().append({"line": "dense", "lr": 0.5, "accuracy": 0.1})
    caltech.tuning().append({"line": "gmp, global", "lr": 0.25, "accuracy": 0.1})
    runs: list[tuple[Path, list[str]]] = []

    def finished(folder: Path, options: list[str]) -> dict[str, float]:
        runs.append((folder, options))
        return {"accuracy": 0.1}

    monkeypatch.setattr(caltech, "finished", finished)
    caltech.train(caltech.Key("gmp, global, teacher", "0.9", 3), "hub:x", "file", 1)
    assert [folder.name for folder, _ in runs] == ["dense-3", "gmp-global-teacher-0.9-3"]
    rates = [options[options.index("--lr") + 1] for _, options in runs]
    assert rates == ["0.5", "0.25"]
    assert runs[1][1][runs[1][1].index("--teacher") + 1] == str(runs[0][0])
    assert [run["line"] for run in caltech.results().read()] == ["gmp, global, teacher"]


def test_a_network_is_packed_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caltech, "ROUNDS", 2)
    torch.manual_seed(0)
    model = build("resnet-digits", num_classes=3, in_channels=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape) < 0.1)
    image = torch.randn(1, 1, 8, 8)
    assert count(model, image).sparsity > 0.8
    found = caltech.measured(model, model, image)
    assert 0 < found["bytes_float16"] < found["bytes"] < 4 * sum(p.numel() for p in model.parameters()) / 3
    assert found["ms"] > 0 < found["dense_ms"]


def test_each_run_of_the_first_seed_is_deployed_with_its_own_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caltech, "RESULTS", tmp_path)
    density = {"model.0.0": 0.5, "model.13.3": 0.1, "fc": 0.25}
    for line, target, seed in (("dense", "", 0), ("str-exact", "0.9", 0), ("str-exact", "0.9", 1)):
        key = caltech.Key(line, target, seed)
        caltech.results().append(key._asdict() | {"density": density if target else {}})
    found: list[list[float]] = []

    def measured(model: torch.nn.Module, dense: torch.nn.Module, image: torch.Tensor) -> dict[str, int]:
        weights = [model.get_submodule(name).weight for name in density]
        found.append([round(int(weight.count_nonzero()) / weight.numel(), 3) for weight in weights])
        assert torch.isfinite(model(image)).all()
        return {"bytes": 1}

    monkeypatch.setattr(caltech, "measured", measured)
    caltech.deploy_all(threads=torch.get_num_threads())
    assert found == [[1.0, 1.0, 1.0], [0.5, 0.1, 0.25]]
    lines = [json.loads(line) for line in (tmp_path / "caltech_deploy.jsonl").read_text().splitlines()]
    assert [(line["line"], line["target"]) for line in lines] == [("dense", ""), ("str-exact", "0.9")]


def test_the_recipe_needs_data_and_weights() -> None:
    config = RECIPES["mobilenetv1-finetune"]()
    assert (config.data, config.pretrained, config.new_classifier) == ("", None, True)
