"""LowRankWeight.surviving: products without the components that are cut."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, LowRankWeight, RankController, RankTarget
from str_triton.nn import low_rank
from str_triton.nn.recurrent import low_rank_rnn
from str_triton.rnn.models import CELLS


@pytest.fixture(autouse=True)
def one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not fill up, so that small matrices have few columns."""
    monkeypatch.setattr(low_rank, "COLUMNS", 1)


def cut_to(matrix: LowRankWeight, rank: int) -> None:
    sizes = matrix.singular_values().sort(descending=True).values
    nn.init.constant_(matrix.raw_threshold, ((sizes[rank - 1] + sizes[rank]) / 2).log().item() if rank else 5.0)


def use_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRankWeight, "_reads_values", lambda self, sizes: False)


def columns(matrix: LowRankWeight) -> int:
    u, spectrum, v = matrix.surviving()
    assert u.shape[1] == v.shape[1] == len(spectrum)
    return len(spectrum)


@pytest.mark.parametrize(
    ("fill", "rank", "expected"), [(1, 3, 3), (1, 0, 1), (4, 3, 4), (4, 4, 4), (4, 5, 8), (16, 3, 9)]
)
def test_the_columns_are_the_survivors_filled_up(
    monkeypatch: pytest.MonkeyPatch, fill: int, rank: int, expected: int
) -> None:
    monkeypatch.setattr(low_rank, "COLUMNS", fill)
    matrix = LowRankWeight(12, 9)
    cut_to(matrix, rank)
    assert columns(matrix) == expected
    u, spectrum, v = matrix.surviving()
    torch.testing.assert_close((u * spectrum) @ v.mT, matrix.weight())


def test_a_component_comes_back_with_a_lower_threshold() -> None:
    matrix = LowRankWeight(12, 9)
    for rank in (9, 2, 6, 1, 8):
        cut_to(matrix, min(rank, 8))
        assert columns(matrix) == min(rank, 8)


def test_not_a_number_is_not_cut() -> None:
    matrix = LowRankWeight(12, 9)
    cut_to(matrix, 2)
    with torch.no_grad():
        matrix.v[0, 7] = torch.nan
    assert columns(matrix) == 3
    assert matrix(torch.zeros(1, 9)).isnan().all()


def test_what_needs_all_components_gets_them() -> None:
    straight = LowRankWeight(12, 9, gradient="straight_through")
    cut_to(straight, 2)
    assert columns(straight) == 9
    matrix = LowRankWeight(12, 9)
    cut_to(matrix, 2)
    assert columns(matrix.to("meta")) == 9


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("graph", ["compile", "export", "trace", "vmap"])
def test_graphs_hold_for_every_rank(graph: str) -> None:
    matrix, x = LowRankWeight(12, 9), torch.randn(2, 9)
    cut_to(matrix, 2)
    if graph == "compile":
        call = torch.compile(matrix, fullgraph=True, backend="eager")
    elif graph == "export":
        exported = torch.export.export(matrix, (x,)).module()
        call = exported
    elif graph == "trace":
        call = torch.jit.trace(matrix, (x,), check_trace=False)
    else:

        def call(x: Tensor) -> Tensor:
            stacked = {name: value[None] for name, value in matrix.named_parameters()}
            return torch.func.vmap(lambda own: functional_call(matrix, own, (x,)))(stacked)[0]

    for rank in (2, 7):
        raw = dict(call.named_parameters())["raw_threshold"] if graph == "export" else matrix.raw_threshold
        cut_to(matrix, rank)
        with torch.no_grad():
            raw.copy_(matrix.raw_threshold)
        torch.testing.assert_close(call(x), x @ matrix.weight().mT)


@pytest.mark.parametrize("cell", CELLS.values())
def test_gradients_of_a_layer_are_those_with_all_columns(cell: type, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    layer = cell(5, 8, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    for matrix in layer.factors().values():
        cut_to(matrix, 2)

    def grads() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))

    few = grads()
    use_all_columns(monkeypatch)
    torch.testing.assert_close(few, grads())
    by_name = dict(zip((name for name, _ in layer.named_parameters()), few, strict=True))
    for name, matrix in layer.factors().items():
        cut = matrix.spectrum() == 0
        assert cut.sum() >= 3
        for part in ("u", "m", "v"):
            assert (by_name[f"{name}.{part}"][..., cut] == 0).all()


def test_training_is_the_same_with_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's moments, weight decay, thresholds that move back and forth, new factors, and settled ranks."""

    def train() -> list[Tensor]:
        torch.manual_seed(2)
        layer = LowRankFastGRNN(5, 12, dtype=torch.float64)
        controller = RankController(layer, RankTarget(total_rank=6), interval=3, end=0.6)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, weight_decay=1e-3)
        ranks = []
        for step in range(60):
            loss = layer(torch.randn(7, 4, 5, dtype=torch.float64))[0].square().sum()
            optimizer.zero_grad()
            loss.backward()
            matrix = layer.weight_hh_l0
            assert all(parameter.grad is not None for parameter in (matrix.u, matrix.m, matrix.v))
            optimizer.step()
            controller.step((step + 1) / 60)
            ranks.append(sum(layer.ranks().values()))
        assert ranks[-1] == 6
        assert any(later > earlier for earlier, later in itertools.pairwise(ranks))  # some came back
        return [*layer.state_dict().values(), *(s for state in optimizer.state.values() for s in state.values())]

    few = [value for value in train() if isinstance(value, Tensor)]
    use_all_columns(monkeypatch)
    torch.testing.assert_close(few, [value for value in train() if isinstance(value, Tensor)], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cell", [LowRankGRU, LowRankLSTM])
def test_the_execution_is_chosen_by_the_columns(cell: type, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, choose = [], low_rank_rnn.fastest

    def spy(name: str, hidden: int, rank: int, *args: int, **options: bool) -> str:
        asked.append(rank)
        return choose(name, hidden, rank, *args, **options)

    monkeypatch.setattr(low_rank_rnn, "fastest", spy)
    layer = cell(5, 8)
    cut_to(layer.weight_hh_l0, 3)
    layer(torch.randn(6, 3, 5))
    assert asked == [3]
