"""Conversions from torch's layers, back to them, and to the compact form; copies and state dicts."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_sequence

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, LowRankRNN, LowRankWeight
from str_triton.rnn.models import CELLS

LOW_RANK = {nn.GRU: LowRankGRU, nn.LSTM: LowRankLSTM}
INPUT, HIDDEN = 6, 8
each_torch_class = pytest.mark.parametrize("torch_class", LOW_RANK, ids=lambda cls: cls.__name__)
each_layer = pytest.mark.parametrize("layer_class", CELLS.values(), ids=lambda cls: cls.__name__)


def flat(results: tuple) -> list[Tensor]:
    output, final = results
    return [output, *([final] if isinstance(final, Tensor) else final)]


def assert_same_function(a: nn.Module, b: nn.Module, *, tolerance: float = 1e-5) -> None:
    shape = (2, 7, INPUT) if a.batch_first else (7, 2, INPUT)
    x = torch.randn(shape, dtype=next(a.parameters()).dtype)
    torch.testing.assert_close(flat(a(x)), flat(b(x)), rtol=tolerance, atol=tolerance)


@each_torch_class
@pytest.mark.parametrize("raw", [-30.0, -10.0, -1.0, 0.5])
def test_from_dense_and_back(torch_class: type, raw: float) -> None:
    for num_layers, bias, flag in itertools.product([1, 2], [True, False], [True, False]):
        dense = torch_class(INPUT, HIDDEN, num_layers, bias, flag, 0.5 if num_layers == 2 else 0.0, not flag).eval()
        state = torch.get_rng_state()
        layer = LOW_RANK[torch_class].from_dense(dense, raw_threshold_init=raw)
        back = layer.to_dense()
        assert torch.equal(torch.get_rng_state(), state)
        assert (type(layer), type(back)) == (LOW_RANK[torch_class], torch_class)
        assert (layer.training, back.training) == (False, False)
        assert repr(back) == repr(dense)
        assert layer.weight_hh_l0.raw_threshold.item() == pytest.approx(raw)
        assert layer.ranks() == {name: factor.max_rank for name, factor in layer.factors().items()}
        assert_same_function(layer, dense)
        assert_same_function(back, dense)
        torch.testing.assert_close(back.state_dict(), dense.state_dict(), rtol=1e-5, atol=1e-5)
        assert all(parameter.requires_grad for parameter in back.parameters())


@each_torch_class
def test_from_dense_with_fewer_components(torch_class: type) -> None:
    dense = torch_class(INPUT, HIDDEN, dtype=torch.float64)
    layer = LOW_RANK[torch_class].from_dense(dense, max_rank=3, input_max_rank=2, factorize="both", g="sigmoid")
    assert layer.ranks() == {"weight_ih_l0": 2, "weight_hh_l0": 3}
    assert (layer.weight_hh_l0.g, layer.weight_hh_l0.u.dtype) == ("sigmoid", torch.float64)
    u, sigma, vh = torch.linalg.svd(dense.weight_hh_l0.detach(), full_matrices=False)
    torch.testing.assert_close(
        layer.weight_hh_l0.weight().detach(), (u[:, :3] * sigma[:3]) @ vh[:3], rtol=1e-6, atol=1e-7
    )
    recurrent = LOW_RANK[torch_class].from_dense(dense, factorize="recurrent")
    assert torch.equal(recurrent.weight_ih_l0, dense.weight_ih_l0)
    assert recurrent.weight_ih_l0 is not dense.weight_ih_l0


class OwnGRU(nn.GRU):
    def forward(self, x, h=None):
        return super().forward(2 * x, h)


def test_from_dense_refuses_what_it_is_not() -> None:
    for layer_class, dense, error, message in (
        (LowRankGRU, nn.LSTM(3, 4), TypeError, "LowRankGRU.from_dense needs nn.GRU, got LSTM"),
        (LowRankLSTM, nn.GRU(3, 4), TypeError, "LowRankLSTM.from_dense needs nn.LSTM, got GRU"),
        (LowRankRNN, nn.RNN(3, 4), TypeError, "torch has no dense form of LowRankRNN"),
        (LowRankGRU, OwnGRU(3, 4), TypeError, "OwnGRU has a forward of its own"),
        (LowRankGRU, LowRankGRU(3, 4), TypeError, "LowRankGRU.from_dense needs nn.GRU, got LowRankGRU"),
        (LowRankLSTM, nn.LSTM(3, 4, proj_size=2), ValueError, "proj_size must be 0, got 2. `sparsify` prunes"),
        (LowRankFastGRNN, nn.RNN(3, 4), TypeError, "torch has no dense form of LowRankFastGRNN"),
    ):
        with pytest.raises(error, match=message):
            layer_class.from_dense(dense)


def test_to_dense_of_a_fastgrnn_is_its_own_class() -> None:
    layer = LowRankFastGRNN(INPUT, HIDDEN, 2, bidirectional=True, batch_first=True, max_rank=3).eval()
    dense = layer.to_dense()
    assert (type(dense), dense.factors(), dense.training) == (LowRankFastGRNN, {}, False)
    assert_same_function(dense, layer)


def cut(matrix: LowRankWeight, rank: int) -> None:
    """Set the threshold so that it leaves `rank` components."""
    sizes = torch.cat([torch.tensor([1e9]), matrix.singular_values().sort(descending=True).values, torch.tensor([0.0])])
    nn.init.constant_(matrix.raw_threshold, ((sizes[rank] + sizes[rank + 1]) / 2).log().item())


# The ranks that survive. Both matrices of the backward direction become dense, whatever the number of gates.
CUTS = {"weight_ih_l0": 0, "weight_hh_l0": 2, "weight_ih_l0_reverse": 6, "weight_hh_l0_reverse": 7}


@each_layer
def test_compact_is_the_same_function_without_thresholds(layer_class: type) -> None:
    layer = layer_class(INPUT, HIDDEN, 1, True, True, bidirectional=True).eval()
    for name, rank in CUTS.items():
        cut(getattr(layer, name), rank)
    assert layer.ranks() == CUTS
    compact = layer.compact()
    assert compact.ranks() == {"weight_ih_l0": 1, "weight_hh_l0": 2}
    assert not [name for name in compact.state_dict() if name.endswith((".m", "raw_threshold"))]
    assert all(isinstance(getattr(compact, name), nn.Parameter) for name in CUTS if "reverse" in name)
    assert {name: matrix.recurrent for name, matrix in compact.factors().items()} == {
        "weight_ih_l0": False,
        "weight_hh_l0": True,
    }
    assert (compact.training, compact.batch_first) == (False, True)
    assert_same_function(compact, layer)
    assert_same_function(compact.compact(), layer)
    assert_same_function(compact.to_dense(), layer)
    mine = {parameter.data_ptr() for parameter in layer.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in compact.parameters()}
    weights = sum(matrix.compact_cost(matrix.rank or 1) for matrix in layer.factors().values())
    vectors = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    assert sum(parameter.numel() for parameter in compact.parameters()) == weights + vectors


@each_layer
def test_a_compact_state_dict_fits_a_layer_of_the_same_ranks(layer_class: type) -> None:
    layer = layer_class(INPUT, HIDDEN, 2, max_rank=2, factorize="recurrent")
    compact = layer.compact()
    file = io.BytesIO()
    torch.save(compact.state_dict(), file)
    file.seek(0)
    rebuilt = layer_class(INPUT, HIDDEN, 2, ranks=compact.ranks())
    rebuilt.load_state_dict(torch.load(file))
    assert repr(rebuilt) == repr(compact)
    x = torch.randn(7, 2, INPUT)
    assert torch.equal(rebuilt(x)[0], compact(x)[0])


@each_layer
def test_a_whole_cut_layer_stays_differentiable(layer_class: type) -> None:
    layer = layer_class(INPUT, HIDDEN, raw_threshold_init=-3.0)
    for matrix in layer.factors().values():
        cut(matrix, 0)
    output, _ = layer(torch.randn(7, 2, INPUT))
    output.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@each_layer
def test_scaling_a_column_against_m_changes_neither_the_function_nor_what_is_cut(layer_class: type) -> None:
    layer = layer_class(INPUT, HIDDEN, dtype=torch.float64)
    for matrix in layer.factors().values():
        cut(matrix, 3)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for matrix in twin.factors().values():
            scale = 10 ** torch.linspace(-3, 3, matrix.max_rank, dtype=torch.float64)
            matrix.u.mul_(scale)
            matrix.m.div_(scale)
    assert twin.ranks() == layer.ranks() == {"weight_ih_l0": 3, "weight_hh_l0": 3}
    for mine, own in zip(twin.factors().values(), layer.factors().values(), strict=True):
        assert ((mine.spectrum() == 0) == (own.spectrum() == 0)).all()
    assert_same_function(twin, layer, tolerance=1e-9)


@each_layer
def test_copies_and_state_dicts(layer_class: type) -> None:
    layer = layer_class(INPUT, HIDDEN, 2, bidirectional=True)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = layer_class(INPUT, HIDDEN, 2, bidirectional=True)
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(7, 2, INPUT)
    expected = layer(x)[0]
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), loaded
    assert all(torch.equal(twin(x)[0], expected) for twin in twins)
    doubled = layer.double()
    torch.testing.assert_close(doubled(x.double())[0].float(), expected)
    state = layer.state_dict()
    zeros = {name: torch.zeros_like(value) if value.is_floating_point() else value for name, value in state.items()}
    assert not functional_call(layer, zeros, x.double())[0].any()


@each_layer
def test_reset_parameters_begins_anew(layer_class: type) -> None:
    layer = layer_class(INPUT, HIDDEN, 2, bidirectional=True, raw_threshold_init=-3.0)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    fresh = layer_class(INPUT, HIDDEN, 2, bidirectional=True, raw_threshold_init=-3.0)
    for a, b in zip(layer.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


@each_layer
def test_meta_and_dtype(layer_class: type) -> None:
    on_meta = layer_class(INPUT, HIDDEN, device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert {matrix.u.dtype for matrix in on_meta.factors().values()} == {torch.bfloat16}
    with torch.device("meta"):
        assert layer_class(INPUT, HIDDEN).weight_hh_l0.u.is_meta


@each_layer
def test_packed_sequences_in_any_order_are_run_one_by_one(layer_class: type) -> None:
    """Check that a sequence of a packed batch gives the same outputs and states as alone."""
    layer = layer_class(INPUT, HIDDEN, 2, bidirectional=True, max_rank=3)
    sequences = [torch.randn(length, INPUT) for length in (3, 7, 1, 7)]
    output, final = layer(pack_sequence(sequences, enforce_sorted=False))
    padded, _ = nn.utils.rnn.pad_packed_sequence(output)
    for i, sequence in enumerate(sequences):
        alone, alone_final = layer(sequence)
        torch.testing.assert_close(padded[: len(sequence), i], alone)
        for together, single in zip(flat((output, final))[1:], flat((alone, alone_final))[1:], strict=True):
            torch.testing.assert_close(together[:, i], single)
