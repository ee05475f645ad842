"""torch's own kernel for one layer: one op under torch.compile, with the same results."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from str_triton.nn.recurrent import dense_kernel
from str_triton.nn.recurrent.dense_kernel import _in_one_buffer, dense_layer

STEPS, INPUT, HIDDEN = 7, 3, 4


def each_cell(test):
    return pytest.mark.parametrize("torch_class", [nn.GRU, nn.LSTM], ids=["gru", "lstm"])(test)


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, dense: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.dense = nn.ParameterList(dense.parameters())
        self.options = {"bias": dense.bias, "bidirectional": dense.bidirectional}
        self.cell = type(dense).__name__.lower()

    def forward(self, x, *states):
        return dense_layer(self.cell, x, states, [weight * 1 for weight in self.dense], **self.options)


@each_cell
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_graph_holds_it_as_one_operation(torch_class: type, bias: bool, bidirectional: bool) -> None:
    dense = torch_class(INPUT, HIDDEN, bias=bias, bidirectional=bidirectional)
    x = torch.randn(2, STEPS, INPUT).transpose(0, 1).requires_grad_()
    states = [
        torch.randn(1 + bidirectional, 2, HIDDEN, requires_grad=True) for _ in range(1 + (torch_class is nn.LSTM))
    ]
    graphs = []

    def record(graph: GraphModule, arguments: list) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph)

    layer, results = Layer(dense), []
    for run in (layer, torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record)), None):
        if run is None:
            output, final = dense(x, tuple(states) if len(states) > 1 else states[0])
            outputs = output, *(final if len(states) > 1 else [final])
        else:
            outputs = run(x, *states)
        loss = sum((part * torch.linspace(0.5, 2, part.numel()).view_as(part)).sum() for part in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [x, *states, *dense.parameters()])])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])
    assert [sum("dense_layer" in str(node.target) for node in graph.graph.nodes) for graph in graphs] == [1, 1]


@each_cell
def test_a_graph_casts_under_autocast(torch_class: type) -> None:
    layer = Layer(torch_class(INPUT, HIDDEN))
    arguments = [
        torch.randn(STEPS, 2, INPUT),
        *(torch.randn(1, 2, HIDDEN) for _ in range(1 + (torch_class is nn.LSTM))),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments)
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    torch.testing.assert_close([output.float() for output in outputs], list(layer(*arguments)), rtol=5e-2, atol=5e-2)


def test_the_ops_are_what_they_are_registered_as() -> None:
    weights = [weight.detach() for weight in nn.LSTM(INPUT, HIDDEN).parameters()]
    x, states = torch.randn(STEPS, 2, INPUT), [torch.randn(1, 2, HIDDEN) for _ in range(2)]
    arguments = "lstm", x, states, weights, True, False
    operation, backward = torch.ops.str_triton_rnn.dense_layer.default, torch.ops.str_triton_rnn.dense_layer_backward
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
    grads = [torch.randn(STEPS, 2, HIDDEN), *(torch.randn(1, 2, HIDDEN) for _ in range(2))]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = backward(grads, *arguments)
    assert [(f.shape, f.stride()) for f in fake] == [(g.shape, g.stride()) for g in backward(grads, *arguments)]


def test_weights_in_one_buffer_are_the_same_in_cudnns_order() -> None:
    weights = list(nn.LSTM(INPUT, HIDDEN, bidirectional=True).parameters())
    views = _in_one_buffer(weights)
    assert all(torch.equal(view, weight) for view, weight in zip(views, weights, strict=True))
    offsets = [view.storage_offset() for view in (*views[:2], *views[4:6], *views[2:4], *views[6:])]
    sizes = [weight.numel() for weight in (*weights[:2], *weights[4:6], *weights[2:4], *weights[6:])]
    assert offsets == [0, *torch.tensor(sizes).cumsum(0)[:-1].tolist()]


def test_autocast_leaves_an_lstm_in_the_weights_dtype_where_the_processor_lacks_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense_kernel, "_autocast_fails", lambda: torch.is_autocast_enabled("cpu"))
    layer, x, states = Layer(nn.LSTM(INPUT, HIDDEN)), torch.randn(STEPS, 2, INPUT), torch.zeros(2, 1, 2, HIDDEN)
    expected = layer(x.bfloat16().float(), *states)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16(), *states)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
