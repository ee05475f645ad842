"""The ONNX export: valid models, two products for factors, and the network's scores in onnxruntime."""

import dataclasses
from pathlib import Path

import pytest
import torch

from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.models import Architecture
from str_triton.rnn.onnx_export import largest_deviation, streaming, unrolled
from tests.rnn.made_runs import CASES, HIDDEN, INPUTS, OUTPUTS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TEXT = {
    f"{cell} text": FinishedRun(
        Path("made"),
        {"data": "text"},
        Architecture("lm", cell, OUTPUTS, OUTPUTS, HIDDEN, layers=2).build(ranks={"weight_hh_l1": 3}).eval(),
        tuple("abcd"),
        None,
        None,
    )
    for cell in ("gru", "lstm", "fastgrnn")
}
RUNS = {**CASES, **TEXT}


@pytest.mark.parametrize("steps", [1, 7, None])
@pytest.mark.parametrize("name", RUNS)
def test_onnxruntime_gives_torchs_scores(name: str, steps: int | None) -> None:
    run = RUNS[name]
    if steps is None and run.model.rnn.bidirectional:
        with pytest.raises(ValueError, match="made: a bidirectional network"):
            streaming(run)
        return
    model = streaming(run) if steps is None else unrolled(run, steps)
    onnx.checker.check_model(model, full_check=True)
    assert largest_deviation(run, model.SerializeToString(), steps) <= 1e-5


def test_a_matrix_in_factors_is_two_products_at_each_step() -> None:
    model = unrolled(CASES["fastgrnn low-rank"], 7).graph
    shapes = {constant.name: list(constant.dims) for constant in model.initializer}
    assert shapes["weight_hh_l1.v"] == [HIDDEN, 3]
    assert shapes["weight_hh_l1.u"] == [3, HIDDEN]
    products = [node.input[1] for node in model.node if node.op_type == "MatMul"]
    # The input's products process all steps at once.
    assert {factor: products.count(factor) for factor in products} == {
        **{f"weight_{kind}_l{i}.{factor}": n for kind, n in (("ih", 1), ("hh", 7)) for i in (0, 1) for factor in "uv"},
        "scores.weight": 1,
    }


def test_its_inputs_and_outputs_have_names_and_shapes() -> None:
    def shapes(values: list) -> dict[str, list]:
        return {
            value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in values
        }

    graph = unrolled(CASES["lstm low-rank, mean"], 7).graph
    assert shapes(graph.input) == {"frames": ["batch", 7, INPUTS]}
    assert shapes(graph.output) == {"scores": ["batch", OUTPUTS]}
    graph = streaming(CASES["lstm low-rank, mean"]).graph
    state = {"h": [2, "batch", HIDDEN], "c": [2, "batch", HIDDEN], "total": ["batch", HIDDEN], "steps": [1]}
    assert shapes(graph.input) == {"frame": ["batch", INPUTS], **state}
    assert shapes(graph.output) == {
        "scores": ["batch", OUTPUTS],
        **{f"next_{name}": shape for name, shape in state.items()},
    }


@pytest.mark.parametrize("steps", [7, None])
def test_a_network_that_is_not_the_same_is_seen(steps: int | None) -> None:
    run = CASES["gru low-rank"]
    content = (streaming(run) if steps is None else unrolled(run, steps)).SerializeToString()
    assert largest_deviation(dataclasses.replace(run, mean=run.mean + 0.01), content, steps) > 1e-4
    other = dataclasses.replace(run, std=torch.ones(INPUTS))
    assert largest_deviation(other, content, steps) > 1e-4
