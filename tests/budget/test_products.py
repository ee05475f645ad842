"""FLOPs of products that no module shows: recurrent kernels, experts, operators of other libraries."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from str_triton.budget.count import count
from str_triton.ops.low_rank_cell import CELLS
from tests.messages import holding
from tests.ops.low_rank_cases import example, op

GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}
OPTIONS = [
    *({"num_layers": n, "bidirectional": b} for n, b in itertools.product((1, 2), (False, True))),
    {"batch_first": True},
    {"bias": False},
    {"dropout": 0.5, "num_layers": 2},
]


def expected(kind: type[nn.RNNBase], uses: int, *, layers: int = 1, directions: int = 1, proj: int = 0) -> int:
    """Multiply-adds of a layer of 5 inputs and 7 units that takes `uses` vectors, from the equations."""
    gates, state = 7 * GATES[kind], proj or 7
    total = 0
    for layer in range(layers):
        inputs = 5 if layer == 0 else directions * state
        total += directions * uses * (gates * inputs + gates * state + 7 * proj)
    return total


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_recurrent_layers(kind, options):
    layer = kind(5, 7, **options)
    with torch.no_grad():
        layer.weight_hh_l0[: len(layer.weight_hh_l0) // 2] = 0
    budget = count(layer, torch.randn(4, 3, 5))
    sizes = {"layers": options.get("num_layers", 1), "directions": 1 + options.get("bidirectional", False)}
    assert budget.dense_flops == expected(kind, 12, **sizes)
    assert all(row.dense_flops == 12 * row.params and row.flops == 12 * row.nonzeros for row in budget.rows)
    assert budget.nonzeros == budget.params - 7 * (len(layer.weight_hh_l0) // 2)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_with_projections(directions):
    layer = nn.LSTM(5, 7, 2, proj_size=2, bidirectional=directions == 2)
    budget = count(layer, torch.randn(4, 3, 5))
    assert budget.dense_flops == expected(nn.LSTM, 12, layers=2, directions=directions, proj=2)
    assert {row.dense_flops // row.params for row in budget.rows} == {12}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_count_their_own_steps(kind, bidirectional):
    layer = kind(5, 7, 2, bidirectional=bidirectional)
    packed = pack_padded_sequence(torch.randn(4, 3, 5), torch.tensor([1, 4, 2]), enforce_sorted=False)
    model = nn.Module()
    model.layer = layer
    model.forward = lambda packed: layer(packed)
    assert count(model, (packed,)).dense_flops == expected(kind, 7, layers=2, directions=1 + bidirectional)


@pytest.mark.parametrize("kind", GATES)
def test_recurrent_layers_without_a_batch_and_with_a_first_state(kind):
    x, state = torch.randn(4, 5), torch.zeros(1, 7)
    budget = count(kind(5, 7), (x, [state, state] if kind is nn.LSTM else state))
    assert budget.dense_flops == expected(kind, 4)


def test_nonlinearity_relu():
    assert count(nn.RNN(5, 7, nonlinearity="relu"), torch.randn(4, 3, 5)).dense_flops == expected(nn.RNN, 12)


@pytest.mark.parametrize(("cell", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_cells(cell, gates):
    budget = count(cell(5, 7), torch.randn(3, 5))
    assert [row.dense_flops for row in budget.rows] == [3 * gates * 7 * 5, 3 * gates * 7 * 7]


def test_what_follows_a_recurrent_layer_is_an_activation():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(5, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, (h, _) = self.rnn(x)
            return self.head(out) @ self.head(h[0]).T  # The second product is one of activations.

    rows = {row.name: row.dense_flops for row in count(Model(), torch.randn(4, 3, 5)).rows}
    assert rows["head"] == (12 + 3) * 14


def test_recurrent_layers_in_inference_mode_and_on_the_meta_device():
    with torch.inference_mode():
        assert count(nn.LSTM(5, 7), torch.randn(4, 3, 5)).dense_flops == expected(nn.LSTM, 12)
    assert count(nn.GRU(5, 7, device="meta"), torch.zeros(4, 3, 5, device="meta")).flops == expected(nn.GRU, 12)


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 1, 2])])
@pytest.mark.parametrize("cell", CELLS)
def test_loops_over_time_of_this_library(cell, lengths):
    case, gates = example(cell, 4, 3, 7, 2, dtype=torch.float32), CELLS[cell].gates

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.m, self.v = (nn.Parameter(case.tensors[name]) for name in "umv")

        def forward(self, gates_x: Tensor) -> Tensor:
            rest = list(case.tensors.values())[4:]
            return op(cell)(gates_x, self.u, self.m, self.v, *rest, lengths)[0]

    steps = 12 if lengths is None else 7
    rows = count(Model(), case.tensors["gates_x"]).rows
    assert [row.dense_flops for row in rows] == [steps * 14 * gates, steps * 14]


def test_bilinear():
    layer = nn.Bilinear(5, 4, 3)
    assert count(layer, (torch.randn(2, 6, 5), torch.randn(2, 6, 4))).dense_flops == 12 * 60


class Experts(nn.Module):
    """Two of four experts for each of six tokens, in one of the ways that models of the kind compute them."""

    def __init__(self, way: str):
        super().__init__()
        self.up, self.way = nn.Parameter(torch.randn(4, 8, 5)), way

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        if self.way == "loop":
            return torch.cat([F.linear(x[(chosen == i).any(1)], self.up[i]) for i in range(4)])
        x = x.repeat_interleave(2, 0)
        if self.way == "index":
            return torch.bmm(self.up[chosen.flatten()], x[..., None])
        if self.way == "index_select":
            return torch.einsum("tk,tnk->tn", x, self.up.index_select(0, chosen.flatten()))
        ends = torch.bincount(chosen.flatten(), minlength=4).cumsum(0).to(torch.int32)
        return torch._grouped_mm(x[chosen.flatten().argsort()], self.up.transpose(1, 2), offs=ends)


@pytest.mark.parametrize("way", ["loop", "index", "index_select", "grouped"])
def test_experts(way):
    model = Experts(way)
    with torch.no_grad():
        model.up[:, ::2] = 0
    chosen = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3], [3, 0], [2, 1]])
    x = torch.randn(6, 5)
    if way == "grouped":  # Its rows are aligned to 16 bytes.
        model.up = nn.Parameter(model.up.detach()[..., :4].clone())
        x = x[:, :4]
    (row,) = count(model, (x, chosen)).rows
    assert (row.covered, row.dense_flops, row.flops) == (False, 12 * 8 * x.shape[1], 12 * 4 * x.shape[1])


def test_rows_that_the_input_chooses_are_activations():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.head(self.table[tokens])
            return x @ x.mT

    rows = {row.name: row.dense_flops for row in count(Lookup(), torch.tensor([1, 2, 3])).rows}
    assert rows == {"table": 0, "head": 48}


def test_operators_of_other_libraries_are_named():
    with torch.library._scoped_library("counted_elsewhere", "FRAGMENT") as library:
        library.define("product(Tensor x, Tensor weight) -> Tensor")
        library.impl("product", lambda x, weight: x @ weight.T, "CPU")

        class Model(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.counted_elsewhere.product(x, self.weight)

        with pytest.warns(UserWarning, match=holding("counted_elsewhere.product")) as caught:
            budget = count(nn.Sequential(Model(4, 3), nn.Linear(3, 2)), torch.randn(5, 4))
    assert len(caught) == 1
    assert [row.dense_flops for row in budget.rows] == [0, 30]


def test_packed_sequence_of_one_warns_of_nothing():
    model = nn.Module()
    model.layer = nn.GRU(5, 7)
    model.forward = lambda packed: model.layer(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count(model, (pack_sequence([torch.randn(3, 5)]),)).dense_flops == expected(nn.GRU, 3)
