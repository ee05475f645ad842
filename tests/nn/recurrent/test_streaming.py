"""Steps one at a time: the results of the whole sequence, in constant memory and without gradients."""

import gc

import pytest
import torch
from torch import Tensor

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, LowRankRNN
from str_triton.rnn.models import CELLS, Architecture, compact

INPUT, HIDDEN = 5, 16
each_cell = pytest.mark.parametrize("cell", CELLS)


def cut(layer: LowRankRNN, rank: int) -> None:
    """Set thresholds so that `rank` components of each matrix survive."""
    with torch.no_grad():
        for factor in layer.factors().values():
            sizes = factor.singular_values().sort(descending=True).values
            if rank < len(sizes):
                # Put the threshold between two sizes: at a size, the last bit of exp(log(size)) would decide.
                factor.raw_threshold.fill_(((sizes[rank - 1] + sizes[rank]) / 2).log())


def parts(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@each_cell
def test_ten_thousand_steps_are_the_sequence_in_constant_memory(cell: str) -> None:
    torch.manual_seed(0)
    layer = CELLS[cell](INPUT, HIDDEN)
    cut(layer, 3)
    layer = layer.compact()
    assert set(layer.ranks().values()) == {3}
    x = torch.randn(10_000, 1, INPUT)
    with torch.no_grad():
        outputs, final = layer(x)
        exact, _ = layer.double()(x.double())
    layer.float()
    state, mine, counts = None, torch.empty_like(outputs), []
    for time, now in enumerate(x):
        mine[time], state = layer.step(now, state)
        if time in (10, 9_990):
            counts.append(live_tensors())
    assert (mine - outputs).abs().max() <= 1e-6
    assert (mine - exact).abs().max() <= 1e-6
    for own, expected in zip(parts(state), parts(final), strict=True):
        assert own.shape == (1, 1, HIDDEN)
        assert (own - expected).abs().max() <= 1e-6
        assert own.grad_fn is None
        assert not own.requires_grad
    assert counts[1] <= counts[0]  # fewer if other tests left garbage behind


@each_cell
@pytest.mark.parametrize("factorize", ["both", "recurrent", "none"])
def test_steps_are_the_sequence_whatever_holds_the_matrices(cell: str, factorize: str) -> None:
    layer = CELLS[cell](INPUT, HIDDEN, 2, factorize=factorize, dropout=0.5)
    cut(layer, 3)
    x, state = torch.randn(20, 2, INPUT), None
    outputs, final = layer.eval()(x)
    layer.train()
    for time, now in enumerate(x):
        output, state = layer.step(now, state)
        torch.testing.assert_close(output, outputs[time], rtol=0, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-6)


@each_cell
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_goes_on_from_the_state_of_a_sequence(cell: str, bias: bool) -> None:
    layer = CELLS[cell](INPUT, HIDDEN, bias=bias, batch_first=True).double()
    x = torch.randn(3, 7, INPUT, dtype=torch.float64)
    outputs, final = layer(x)
    _, state = layer(x[:, :6])
    output, state = layer.step(x[:, 6], state)
    torch.testing.assert_close(output, outputs[:, 6])
    torch.testing.assert_close(state, final)


@each_cell
def test_a_step_takes_autocast_as_the_sequence_does(cell: str) -> None:
    layer, x = CELLS[cell](INPUT, HIDDEN), torch.randn(2, 3, INPUT)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs, _ = layer(x)
        first, state = layer.step(x[0])
        second, _ = layer.step(x[1], state)
    torch.testing.assert_close(torch.stack([first, second]), outputs[:2], rtol=0.02, atol=0.02, check_dtype=False)


@pytest.mark.parametrize(
    ("layer", "x", "state", "kind", "message"),
    [
        (LowRankGRU(3, 4, bidirectional=True), (2, 3), None, RuntimeError, "LowRankGRU: a bidirectional layer cannot"),
        (LowRankGRU(3, 4), (1, 2, 3), None, RuntimeError, "input must have 2 dimensions, got 3"),
        (LowRankGRU(3, 4), (2, 5), None, RuntimeError, "Expected 3, got 5"),
        (LowRankLSTM(3, 4), (2, 3), torch.zeros(1, 2, 4), TypeError, r"hx must be a pair of tensors \(h, c\)"),
        (LowRankFastGRNN(3, 4), (2, 3), torch.zeros(1, 1, 4), RuntimeError, r"Expected hidden size \(1, 2, 4\)"),
        (LowRankGRU(3, 4).double(), (2, 3), None, ValueError, "does not match weight dtype"),
    ],
)
def test_what_cannot_be_stepped_is_refused(
    layer: LowRankRNN, x: tuple[int, ...], state: Tensor | None, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        layer.step(torch.zeros(x), state)


@each_cell
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_classifier_scores_every_beginning_of_a_sequence(cell: str, pooling: str) -> None:
    model = Architecture("classify", cell, INPUT, 7, HIDDEN, layers=2, dropout=0.5, pooling=pooling).build()
    model = compact(model).eval()
    x, state = torch.randn(3, 9, INPUT), None
    for time in range(9):
        scores, state = model.train(time % 2 == 0).step(x[:, time], state)
        torch.testing.assert_close(scores, model.eval()(x[:, : time + 1]), rtol=1e-5, atol=1e-6)
        assert not scores.requires_grad
    assert state.steps == 9


def test_a_long_running_mean_loses_nothing() -> None:
    torch.manual_seed(0)
    model = Architecture("classify", "gru", INPUT, 7, HIDDEN, pooling="mean").build().eval()
    x, state = torch.randn(2_000, INPUT), None
    for now in x:
        scores, state = model.step(now[None], state)
    torch.testing.assert_close(scores.double(), model.double()(x[None].double()), rtol=0, atol=1e-6)


@each_cell
def test_a_language_model_goes_character_by_character(cell: str) -> None:
    model = Architecture("lm", cell, 7, 7, HIDDEN, layers=2, dropout=0.5).build().eval()
    characters, state = torch.randint(7, (3, 9)), None
    whole, final = model(characters)
    for time in range(9):
        scores, state = model.step(characters[:, time], state)
        torch.testing.assert_close(scores, whole[:, time], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-6)
