"""The study of the fading gradient: its results can be made again, and its controller is the one that trains."""

import pytest
import torch
from torch import nn

from benchmarks.studies import fading_gradient, methods
from benchmarks.studies.fading_gradient import Fading
from str_triton import Target, sparsify
from str_triton.cnn.config import Config
from str_triton.cnn.methods import prepare
from str_triton.cnn.recipes import resolve


def test_every_line_can_be_run_again() -> None:
    wanted = [run for study in ("cifar", "caltech", "methods") for run in fading_gradient.wanted(study)]
    held = [{name: run[name] for name in fading_gradient.RUNS.key} for run in fading_gradient.RUNS.read()]
    assert held
    assert all(run in wanted for run in held)


def test_pruned_weights_are_trained_ever_more_seldom() -> None:
    model = sparsify(nn.Linear(8, 2, bias=False))
    controller, trained = Fading(model, Target(sparsity=0.5)), []
    for step in range(1000):
        trained.append(model.gradient == "straight_through")
        controller.step((step + 1) / 1000)
    shares = torch.tensor(trained).view(10, 100).float().mean(1)
    torch.testing.assert_close(shares, torch.linspace(0.95, 0.05, 10), atol=0.04, rtol=0)
    assert model.gradient == "masked"


def test_the_program_trains_with_this_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(data: None, seed: int, *, target: float, method: str) -> tuple[None, dict]:
        config = resolve(Config(recipe="methods", method=method, target_sparsity=target))
        return None, {"controller": type(prepare(config, methods.network(methods.WIDTHS), methods.IMAGE))}

    monkeypatch.setattr(methods, "train", train)
    monkeypatch.setattr(fading_gradient, "load", lambda name, folder: None)
    run = fading_gradient.train(next(fading_gradient.wanted("methods")), "", None, torch.get_num_threads())
    assert run["controller"] is Fading
