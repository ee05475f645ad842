"""The ONNX export of modules: onnxruntime's outputs are torch's, factors stay factors, loops are not unrolled."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, deploy, sparsify
from tests.deploy.recurrent_networks import HIDDEN, INPUTS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Stack(nn.Module):
    """Modules one after the other; recurrent layers pass their outputs on."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def test_low_rank_layers_are_loops_of_two_products() -> None:
    """`export_onnx` compares the outputs of two batch sizes and lengths with torch's."""
    module = Stack(
        LowRankGRU(INPUTS, HIDDEN, bidirectional=True, ranks={"weight_hh_l0": 3, "weight_hh_l0_reverse": 3}),
        LowRankLSTM(2 * HIDDEN, HIDDEN, ranks={"weight_hh_l0": 3, "weight_ih_l0": 2}),
        LowRankFastGRNN(HIDDEN, HIDDEN, ranks={"weight_hh_l0": 3, "weight_ih_l0": 2}),
    )
    file = deploy.export_onnx(module, torch.randn(7, 2, INPUTS), dynamic=(0, 1), metadata={"a": "b"})
    model = onnx.load_from_string(file.content)
    assert {prop.key: prop.value for prop in model.metadata_props} == {"a": "b"}
    loops = [node for node in model.graph.node if node.op_type == "Scan"]
    assert len(loops) == 4
    for loop in loops:
        (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
        assert [node.op_type for node in body.node].count("MatMul") == 2
    shapes = [tuple(constant.dims) for constant in model.graph.initializer]
    assert shapes.count((HIDDEN, 3)) == 4
    assert not {(gates * HIDDEN, HIDDEN) for gates in (1, 3, 4)} & {*shapes, *(shape[::-1] for shape in shapes)}


def test_thresholds_and_dense_layers_are_exported() -> None:
    module = Stack(
        sparsify(nn.Linear(INPUTS, HIDDEN), initial_threshold=0.1),
        LowRankGRU(HIDDEN, HIDDEN, raw_threshold_init=-1.0),
        LowRankFastGRNN(HIDDEN, HIDDEN, factorize="none"),
        nn.LSTM(HIDDEN, HIDDEN),
    )
    file = deploy.export_onnx(module, torch.randn(2, 7, INPUTS), dynamic=())
    assert "LSTM" in [node.op_type for node in onnx.load_from_string(file.content).graph.node]


class WithStates(nn.Module):
    """An LSTM with projections that gets its initial states."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(INPUTS, 2 * HIDDEN, proj_size=HIDDEN, **options)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, (h, c) = self.rnn(x, (h, c))
        return outputs, h, c


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_an_lstm_with_projections_is_exported(options: dict[str, Any]) -> None:
    """`export_onnx` compares outputs and states with torch's, for other batch sizes and lengths too."""
    module = WithStates(**options)
    count = len([name for name in module.state_dict() if "weight_hr" in name])
    states = torch.randn(count, 2, HIDDEN), torch.randn(count, 2, 2 * HIDDEN)
    file = deploy.export_onnx(module, (torch.randn(7, 2, INPUTS), *states), dynamic=((1, 0), (1,), (1,)))
    assert file.difference < 1e-5
    assert type(module.rnn) is nn.LSTM
    assert deploy.export_onnx(module.rnn, torch.randn(7, 2, INPUTS), dynamic=(1, 0)).difference < 1e-5


def test_a_file_that_does_not_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's exporter leaves the projections out of ONNX's LSTM, which has none."""
    monkeypatch.setattr("str_triton.deploy.onnx_export.export.replace_projections", lambda module: module)
    with pytest.raises(ValueError, match=r"LSTM: .*does not run: ") as caught:
        deploy.export_onnx(nn.LSTM(INPUTS, 2 * HIDDEN, proj_size=HIDDEN), torch.randn(7, 2, INPUTS), dynamic=(1,))
    assert "\n" not in str(caught.value)


def test_int8_recurrent_weights_are_exported_with_their_values() -> None:
    """The loops compute in float32 with the numbers that the int8 weights stand for, as the reference does."""
    module = Stack(LowRankGRU(INPUTS, HIDDEN, bidirectional=True, max_rank=3), nn.LSTM(2 * HIDDEN, HIDDEN))
    x = torch.randn(7, 2, INPUTS)
    quantized = deploy.quantize(module.eval(), [x])
    assert [layer.left for layer in quantized.report.layers if "int8" in str(layer)] == []
    file = deploy.export_onnx(quantized, x, dynamic=(0, 1))
    assert file.difference < 1e-5
    with torch.no_grad():
        assert (quantized(x) - module(x)).abs().max() > 1e-4


def test_a_network_that_cannot_be_exported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Undecided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Undecided: PyTorch cannot export"):
        deploy.export_onnx(Undecided(), torch.randn(2, 3))
    monkeypatch.setattr("str_triton.deploy.onnx_export.export.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="Linear: as ONNX its outputs differ"):
        deploy.export_onnx(nn.Linear(3, 4), torch.randn(1, 3))


class Branches(nn.Module):
    """Layers whose integers are the same everywhere, and a residual sum, which engines round once more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.head = nn.Conv2d(16, 4, 1), nn.Linear(4 * 5 * 6, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(x))
        y = nn.functional.relu6(self.deep(x))
        z = torch.relu(self.point(torch.cat([nn.functional.max_pool2d(y, 2), nn.functional.max_pool2d(x, 2)], 1)))
        return self.head(z.flatten(1)), self.deep(y) + x


def test_a_quantized_network_is_qdq_and_onnxruntime_computes_our_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 20, 24)
    quantized = deploy.quantize(Branches().eval(), [x])
    file = deploy.export_onnx(quantized, x)
    model = onnx.load_from_string(file.content)
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert {tuple(tensor.dims) for tensor in weights} >= {(8, 3, 3, 3), (8, 1, 3, 3), (4, 16, 1, 1), (7, 120)}
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # no saturation on AVX2
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    session = onnxruntime.InferenceSession(file.content, options, providers=["CPUExecutionProvider"])
    fused = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert fused >= {"QLinearConv", "QLinearAdd", "QGemm"}
    assert not fused & {"Conv", "Gemm", "MatMul"}
    # An engine clamps a summand to the range that was seen, which ours does not: the sums are compared on known images.
    for images, known in ((x[:1], True), (x[1:], True), (torch.randn(3, 3, 20, 24), False)):
        found = map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: images.numpy()}))
        scores, summed = quantized(images)
        assert torch.equal(next(found), scores)
        if known:
            grid = quantized.graph.layers()[-1].grids[1]
            torch.testing.assert_close(next(found), summed, rtol=0, atol=2.01 * grid.scale)


@pytest.mark.parametrize("dynamic", [[(0,), (1,)], [0, (1,)]])
def test_dynamic_axes_must_fit_the_inputs(dynamic: list) -> None:
    with pytest.raises(ValueError, match=r"\(1,\).*each of the 1 inputs"):
        deploy.export_onnx(nn.Linear(3, 4), torch.randn(2, 3), dynamic=dynamic)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_translations_name_the_missing_extra(monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*'str-triton\[onnx\]'"):
        deploy.onnx_translations()
