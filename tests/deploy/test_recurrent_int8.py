"""Recurrent layers with int8 weights: the loop against a plain reference, quantized networks, exports, bad weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.studies.sparse_fuzz_codes import sequence
from str_triton import LowRankGRU, deploy
from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.graph.quantized_recurrent import QuantizedRecurrent, quantized_recurrent
from str_triton.deploy.sparse.graph.recurrent import SIZES
from tests.deploy.recurrent_networks import HIDDEN, INPUTS, Classifier
from tests.deploy.test_sparse_recurrent import exact, inputs, layer

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.filterwarnings("ignore:pack:UserWarning")]

# hidden, rank (None: a dense matrix), batch: odd numbers of pairs, every number of sequences that share a load
SHAPES = [(1, 1, 1), (5, 3, 5), (16, None, 3), (33, 9, 6), (70, 40, 2), (129, None, 1)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", SIZES)
def test_the_loop_equals_a_plain_reference(cell: str, reverse: bool):
    for hidden, rank, batch in SHAPES:
        node = quantized_recurrent(layer(cell, hidden, rank, reverse=reverse))
        values = inputs(node, batch, 3)
        found = EXECUTIONS["loop"].run(node, values)
        for i in range(batch):
            alone = {name: value.narrow(value.dim() - 2, i, 1) for name, value in values.items()}
            assert torch.equal(found[:, i : i + 1], sequence(node, alone)), (hidden, rank, i)
        torch.testing.assert_close(found.double(), exact(node.decoded(), values), rtol=0, atol=3e-4)
        shapes = {name: tuple(value.shape) for name, value in (values | {"y": found}).items()}
        fitting = {name for name, execution in EXECUTIONS.items() if execution.fits(node, shapes)}
        assert fitting == {"dense", "loop"}


def test_one_sequence_does_not_spoil_another():
    node = quantized_recurrent(layer("gru", 20, 6))
    values = inputs(node, 6, 3)
    clean = EXECUTIONS["loop"].run(node, values)
    values["h"][2, 3], values["h"][4, 0] = float("nan"), float("inf")
    found = EXECUTIONS["loop"].run(node, values)
    assert found[:, [2, 4]].isnan().all()
    assert torch.equal(found[:, [0, 1, 3, 5]], clean[:, [0, 1, 3, 5]])
    values = inputs(node, 2, 3)
    values["h"][:] = 0
    assert EXECUTIONS["loop"].run(node, values).isfinite().all()


MODELS = {
    "gru": lambda: Classifier(LowRankGRU(INPUTS, HIDDEN, 2, batch_first=True, ranks={"weight_hh_l0": 3})),
    "lstm": lambda: nn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_quantized_networks(name: str, tmp_path: Path):
    model = MODELS[name]().eval()
    x = torch.randn(4, 7, INPUTS)
    quantized = deploy.quantize(model, [x, torch.randn(4, 7, INPUTS)])
    layers = [error for error in quantized.report.layers if error.label != "head"]
    assert len(layers) == {"gru": 2, "lstm": 4}[name]
    assert all(error.left == "" and 0 < error.alone < 0.02 for error in layers)
    stored = {key: value for key, value in quantized.state_dict().items() if key.endswith(".steps")}
    assert len(stored) == len(layers)
    assert all(quantized.state_dict()[key.replace("steps", "weight")].dtype == torch.int8 for key in stored)
    compiled = deploy.compile_sparse(quantized, x, tune=False)
    executions = [choice.execution for node, choice in compiled.layers() if isinstance(node, QuantizedRecurrent)]
    assert executions == ["loop"] * len(layers)
    found, wanted = (run(x) if name == "gru" else run(x)[0] for run in (compiled, quantized))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 if name == "lstm" else 5e-2)
    compiled.save(tmp_path / "net")
    loaded = deploy.load_sparse(tmp_path / "net")(x)
    assert torch.equal(loaded if name == "gru" else loaded[0], found)
    record, tensors = deploy.inspect(tmp_path / "net").metadata["sparse"], deploy.unpack(tmp_path / "net")
    node = next(node for node in record["nodes"] if node["kind"] == "QuantizedRecurrent")
    keys = {field: node[field]["tensor"] for field in ("weight", "steps")}
    weight, steps = (tensors[key] for key in keys.values())
    changes = [("weight", torch.full_like(weight, -128)), ("weight", weight.float()), ("steps", steps[1:])]
    for field, value in changes:
        changed = {**tensors, keys[field]: value.contiguous()}
        deploy.pack(changed, tmp_path / "bad", metadata={"sparse": record}, plain_zeros=True)
        with pytest.raises(ValueError, match=r"^[^\n]*$"):
            deploy.load_sparse(tmp_path / "bad")


def test_bad_weights_are_refused():
    node = quantized_recurrent(layer("mgu", 6, 2))
    wrong = {
        "weight": [node.weight.float(), torch.full_like(node.weight, -128), node.weight[:-1]],
        "v": [node.v.float(), torch.full_like(node.v, -128), node.v[:, :1]],
        "steps": [
            *(None, node.steps.double(), node.steps[:-1], node.steps[:, None]),
            *(torch.full_like(node.steps, value) for value in (1e38, -1e38, float("inf"), float("nan"))),
        ],
    }
    assert node.is_whole()
    for name, values in wrong.items():
        for value in values:
            changed = quantized_recurrent(layer("mgu", 6, 2))
            setattr(changed, name, value)
            with pytest.raises(ValueError, match="recurrent layer"):
                changed.check_fields()
