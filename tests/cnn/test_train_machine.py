"""--compile, --channels-last and --amp: they say how the machine computes, and leave what is computed as it is."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from str_triton.cnn import train
from str_triton.cnn.config import METHODS, TAKEN_BY
from str_triton.cnn.methods import MASKED
from str_triton.training.metrics import read_metrics
from tests.cnn.train_runs import begin, resume
from tests.runs import Killed, after_calls, assert_same_result, kill, last_checkpoint


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that torch.compile captures; they run as they are, because compiling takes longer than all tests."""
    captured = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        captured.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return captured


def test_a_compiled_run_is_the_same_run(
    tmp_path: Path, quick: None, whole_run: Path, graphs: list, monkeypatch: pytest.MonkeyPatch
):
    """Captured once for each of the gradients that str-exact uses in turn; killed, and resumed without --compile."""
    with monkeypatch.context() as patch:
        after_calls(patch, train, "learning_rate", 8, kill)
        with pytest.raises(Killed):
            begin(tmp_path / "run", "--compile")
    assert len(graphs) == 2
    assert resume(tmp_path / "run", "--no-compile") == 0
    assert len(graphs) == 2
    assert_same_result(tmp_path / "run", whole_run)


@pytest.mark.parametrize("method", MASKED)
def test_masks_move_without_another_compilation(
    method: str, tmp_path: Path, quick: None, small: list[str], graphs: list
):
    interval = ["--mask-interval", "2"] if method in TAKEN_BY["mask_interval"] else []
    assert begin(tmp_path / "run", *small, "--compile", "--method", method, *interval) == 0
    assert len(graphs) == 1
    assert abs(json.loads((tmp_path / "run" / "summary.json").read_text())["sparsity"] - 0.9) <= 1e-4


@pytest.mark.parametrize("method", ["str-exact", "dnw"])
def test_channels_last_is_a_matter_of_memory(method: str, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch):
    seen = []
    forward = train.Experiment.forward

    def watched(self: train.Experiment, batch: tuple) -> object:
        self.model.blocks[0].norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        return forward(self, batch)

    options = ["--method", method, "--epochs", "1"]
    assert begin(tmp_path / "plain", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train.Experiment, "forward", watched)
        assert begin(tmp_path / "last", *options, "--channels-last") == 0
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    weight = last_checkpoint(tmp_path / "last")["model"]["blocks.1.conv1.weight"]
    weight = weight.reshape(weight.shape[-4:])  # A thresholded weight has a further dimension of one in a state dict.
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain, last = (read_metrics(tmp_path / name)[-1] for name in ("plain", "last"))
    assert last["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    assert last["nonzeros"] == plain["nonzeros"]
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("last", "plain"))
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "keep-zeros"])  # It needs a pruned file.
def test_bf16_trains_in_half_precision_and_keeps_float32(
    method: str, tmp_path: Path, quick: None, small: list[str], monkeypatch: pytest.MonkeyPatch
):
    """With a network of two layers: oneDNN's convolutions in bfloat16 are slow on processors without that type."""
    dtypes = set()
    forward = train.Experiment.forward

    def watched(self: train.Experiment, batch: tuple) -> object:
        self.model[1].register_forward_pre_hook(lambda module, inputs: dtypes.add(inputs[0].dtype))
        return forward(self, batch)

    monkeypatch.setattr(train.Experiment, "forward", watched)
    assert begin(tmp_path / "run", *small, "--method", method, "--amp", "bf16", "--epochs", "1") == 0
    assert dtypes == {torch.bfloat16}
    weights = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}
    if method not in ("str", "dense"):
        assert abs(json.loads((tmp_path / "run" / "summary.json").read_text())["sparsity"] - 0.9) <= 1e-4
