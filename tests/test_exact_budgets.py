"""The study of exact budgets: its screen meets the sparsity, its picture draws."""

from pathlib import Path

import pytest
import torch

from benchmarks.studies import exact_budgets
from benchmarks.studies.exact_budgets_screen import RUNS, VARIANTS, train
from str_triton.cnn.data import Data
from str_triton.cnn.data.arrays import ArrayImages, Augmentation, Normalisation


def test_every_line_of_the_screen_can_be_run_again() -> None:
    names = {run["variant"] for run in RUNS.read()}
    assert names
    assert names <= set(VARIANTS)


@pytest.mark.parametrize(
    "name", ["magnitude", "static-0.2", "learned-bounded-masked-rescaled", "surface-flop", "fisher-0.5-near"]
)
def test_the_screen_meets_the_sparsity(name: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.randint(256, (1200, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (1200,))
    arrays = ArrayImages(images, labels, Normalisation((0.0,), (1.0,)), Augmentation())
    few = ArrayImages(images[:10], labels[:10], Normalisation((0.0,), (1.0,)), Augmentation())
    run = train(name, 0.9, 0, Data(arrays, few, tuple("0123456789"), (1, 28, 28), "noise"), len(images), epochs=1)
    assert abs(run["sparsity"] * 239_640 - 0.9 * 239_640) <= 1
    assert min(run["density"]) > 0
    assert 0 < run["flops"] < 1


def test_the_picture_is_drawn_anew_alike(tmp_path: Path) -> None:
    lines = [
        {"method": method, "target": target, "accuracy": 0.9 - target / 10, "flops": 1 - target}
        for method in ("dense", "global")
        for target in ((0.0,) if method == "dense" else (0.9, 0.99))
    ]
    for name in ("a.svg", "b.svg"):
        exact_budgets.picture(lines, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "global" in (tmp_path / "a.svg").read_text()
    assert "prefers-color-scheme: dark" in (tmp_path / "a.svg").read_text()
