"""The paper's recipes on a made-up ImageNet, through the training program: two steps of each, interrupted and resumed.

Images of 224x224 take seconds a step on a CPU: what is not about them is tested on digits.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from str_triton.cnn import train
from str_triton.cnn.models import build
from str_triton.cnn.published import DENSE, POINTS
from str_triton.training.schedules import decayed_thresholds
from tests.cnn.made_up_imagenet import write_imagefolder
from tests.cnn.train_runs import resume, run
from tests.runs import after_calls, last_checkpoint

CLASSES = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training images, two batches: one in CMYK, one in grey, one PNG, two turned. And four others."""
    root = tmp_path_factory.mktemp("imagenet")
    write_imagefolder(root, classes=CLASSES, per_class=2, held_out=1)
    return root


@pytest.mark.parametrize(("name", "layers"), [("resnet50-str-90.23", 54), ("mobilenetv1-str-89.01", 28)])
def test_two_steps_of_the_papers_recipe(
    name: str,
    layers: int,
    images: Path,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    folder = tmp_path / "run"
    options = ["--data", f"imagefolder:{images}", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    with monkeypatch.context() as patch:
        after_calls(patch, train.Experiment, "forward", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(name, *options, "--run-dir", str(folder)) == 143
    assert (
        "stopped after step 1, which is saved; continue with: python cnn/train.py --resume" in capsys.readouterr().err
    )
    first = last_checkpoint(folder)
    assert resume(folder) == 0
    second = last_checkpoint(folder)
    assert (first["step"], second["step"]) == (1, 2)

    point = next(point for point in POINTS if point.name == name)
    rates = [0.256 / 5] * 2  # the first of five epochs that the learning rate rises in
    expected = list(decayed_thresholds(point.raw_threshold_init, rates, point.weight_decay, 0.875))
    for state, value in zip((first, second), expected, strict=True):
        raws = [tensor for key, tensor in state["model"].items() if key.endswith("raw_threshold")]
        assert len(raws) == layers
        torch.testing.assert_close(torch.cat(raws), torch.full([layers], value), rtol=1e-6, atol=0)
    assert not torch.equal(first["model"]["fc.weight"], second["model"]["fc.weight"])

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sparsity"] < 1e-6  # a normal number may be zero
    assert DENSE[point.model].params - summary["params"] == (1000 - CLASSES) * second["model"]["fc.weight"].shape[-1]
    plain = build(point.model, num_classes=CLASSES)
    plain.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
