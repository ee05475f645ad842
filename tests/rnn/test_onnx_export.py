"""The ONNX export of runs: the network's scores in onnxruntime, two products for factors, names, and metadata."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton import deploy
from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.models import Architecture, LanguageModel
from str_triton.rnn.onnx_export import one_step, sequences
from tests.rnn.made_runs import CASES, HIDDEN, INPUTS, OUTPUTS, made_run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LM = Architecture("lm", "lstm", OUTPUTS, OUTPUTS, HIDDEN, layers=2).build(ranks={"weight_hh_l1": 3}).eval()
RUNS = {**CASES, "lstm text": FinishedRun(Path("made"), {"data": "text"}, LM, tuple("abcd"), None, None)}
BATCH = 3


def example(run: FinishedRun, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of the network, and of the file, which standardises them."""
    torch.manual_seed(1)
    if isinstance(run.model, LanguageModel):
        x = torch.randint(OUTPUTS, (BATCH, steps))
        return x, x
    x = torch.randn(BATCH, steps, INPUTS)
    return x, x if run.mean is None else x * run.std + run.mean


def shapes(values: list) -> dict[str, list]:
    """Return the names and shapes of inputs or outputs; the batch has a name of its own in each file."""
    return {value.name: ["batch" if isinstance(size, str) else size for size in value.shape] for value in values}


@pytest.mark.parametrize("name", RUNS)
def test_the_module_that_is_exported_is_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "export_onnx", lambda module, example, **options: (module, example, options))
    run = RUNS[name]
    lm = isinstance(run.model, LanguageModel)
    x, fed = example(run, 7)
    with torch.no_grad():
        wanted = run.model(x)[0] if lm else run.model(x)
    module, shown, options = sequences(run, 7)
    assert (shown.shape[1:], shown.dtype) == (fed.shape[1:], fed.dtype)
    torch.testing.assert_close(module(fed), wanted, rtol=1e-6, atol=1e-6)
    assert (options["inputs"], options["outputs"]) == (["characters" if lm else "frames"], ["scores"])
    about = options["metadata"]
    assert ("standardises" in about.pop("inputs", "")) == (run.mean is not None)
    assert about == {"network": run.name, "outputs": json.dumps(run.outputs)}
    if run.model.rnn.bidirectional:
        return
    module, (shown, *state), options = one_step(run)
    assert len(options["inputs"]) == len(options["outputs"]) == len(options["dynamic"]) == 1 + len(state)
    assert (shown.shape[1:], shown.dtype) == (fed.shape[2:], fed.dtype)
    state = [torch.zeros_like(part) for part in state]
    for time in range(7):
        scores, *state = module(fed[: len(shown), time], *state)
        if lm:
            torch.testing.assert_close(scores, wanted[: len(shown), time], rtol=1e-5, atol=1e-5)
    if not lm:
        torch.testing.assert_close(scores, wanted[: len(shown)], rtol=1e-5, atol=1e-5)


def test_onnxruntime_gives_the_scores_step_by_step_with_two_products_for_a_matrix_in_factors() -> None:
    run = made_run("lstm", pooling="mean")
    file = one_step(run)
    network = onnxruntime.InferenceSession(file.content, providers=["CPUExecutionProvider"])
    hidden = [1, "batch", HIDDEN]
    state = {"h": hidden, "c": hidden, "total": ["batch", HIDDEN], "steps": [1]}
    assert shapes(network.get_inputs()) == {"frame": ["batch", INPUTS], **state}
    following = {f"next_{name}": shape for name, shape in state.items()}
    assert shapes(network.get_outputs()) == {"scores": ["batch", OUTPUTS], **following}
    types = {"total": np.float64, "steps": np.int64}
    fed_state = {
        name: np.zeros([BATCH if size == "batch" else size for size in shape], types.get(name, np.float32))
        for name, shape in state.items()
    }
    (x, fed), torch_state = example(run, 20), None
    for time in range(20):
        scores, *new = network.run(None, {"frame": fed[:, time].numpy(), **fed_state})
        fed_state = dict(zip(state, new, strict=True))
        wanted, torch_state = run.model.step(x[:, time], torch_state)
        torch.testing.assert_close(torch.from_numpy(scores), wanted, rtol=1e-5, atol=1e-5)
    constants = [tuple(constant.dims) for constant in onnx.load_from_string(file.content).graph.initializer]
    assert constants.count((4 * HIDDEN, 3)) + constants.count((3, 4 * HIDDEN)) == 2
    assert not {(4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)} & set(constants)


def test_a_bidirectional_network_has_no_single_step() -> None:
    with pytest.raises(ValueError, match="made: a bidirectional network"):
        one_step(CASES["gru low-rank, bidirectional"])
