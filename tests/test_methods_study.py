"""The study of methods: every line can be run again and meets its sparsity, its picture draws."""

from pathlib import Path

import pytest
import torch

from benchmarks.runs import RunFile
from benchmarks.studies import methods
from str_triton.cnn.data import Data
from str_triton.cnn.data.arrays import ArrayImages, Augmentation, Normalisation


def noise(number: int) -> ArrayImages:
    images = torch.randint(256, (number, 1, 28, 28), dtype=torch.uint8)
    return ArrayImages(images, torch.randint(10, (number,)), Normalisation((0.0,), (1.0,)), Augmentation())


def test_every_line_can_be_run_again() -> None:
    names = {run["line"] for held in (methods.RUNS, methods.TRIALS) for run in held.read()}
    assert names
    assert names <= set(methods.LINES)


@pytest.mark.parametrize(
    "line", ["str-exact", "str-exact, switched at 35 %", "gmp, budget of str-exact", "str-exact, fine-tuned 0.4"]
)
def test_a_line_meets_its_sparsity(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = Data(noise(1000), noise(10), tuple("0123456789"), (1, 28, 28), "noise")
    density = [0.5, 0.2, 0.1, 0.1, 0.05, 0.05, 0.5]
    source = {"line": "str-exact", "target": 0.95, "seed": 0, "density": density}
    held = RunFile(tmp_path / "methods.jsonl", methods.RUNS.key)
    held.append(source)
    monkeypatch.setattr(methods, "RUNS", held)
    monkeypatch.setattr(methods, "EPOCHS", 1)
    run = methods.run_line(line, 0.95, 0, data, lambda seed: methods.network(methods.WIDTHS).state_dict())
    if "budget" in line:
        assert run["density"] == pytest.approx(density, abs=0.01)
    else:
        assert run["sparsity"] == pytest.approx(0.95, abs=1e-4)


def test_the_picture_is_drawn_anew_alike(tmp_path: Path) -> None:
    runs = methods.RUNS.read()
    for name in ("a.svg", "b.svg"):
        methods.picture(runs, tmp_path / name, ["dense", "str-exact"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "str-exact" in (tmp_path / "a.svg").read_text()
