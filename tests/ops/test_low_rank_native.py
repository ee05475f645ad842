"""The recurrent ops with their steps in C, against the loop of the CPU in float64; and what they leave to that loop."""

import pytest
import torch
from torch import Tensor

from str_triton.native.build import library
from str_triton.native.recurrent import CELLS as NATIVE_CELLS
from str_triton.ops.low_rank_cell import CELLS
from tests.ops.low_rank_cases import op

SIZES = [(1, 1, 1, 1), (7, 3, 5, 2), (9, 5, 16, 8), (20, 4, 33, 9), (31, 1, 64, 17), (3, 70, 40, 40)]
each_cell = pytest.mark.parametrize("cell", NATIVE_CELLS)


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if library() is None:
        pytest.skip("no C compiler")


def draw(cell: str, steps: int, batch: int, hidden: int, rank: int) -> list[Tensor]:
    """Return the tensors of a cell's op, in float64."""
    of = CELLS[cell]
    shapes = [(steps, batch, of.gates * hidden), (of.gates * hidden, rank), (rank,), (hidden, rank)]
    shapes += [(hidden,), (hidden,), (1,), (1,)] if cell == "fastgrnn" else [(of.gates * hidden,)]
    shapes += [(batch, hidden)] * len(of.states)
    generator = torch.Generator().manual_seed(hidden)
    tensors = [0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[3] /= hidden**0.5  # A larger recurrent matrix is chaotic in a cell without gates: rounding grows with time.
    return tensors


def results(cell: str, tensors: list[Tensor], **options) -> list[Tensor]:
    """Return outputs, last states and all gradients."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs, states = op(cell)(*tensors, **options)
    values = [outputs, *(states if isinstance(states, tuple) else (states,))]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) for value in values]
    grads = torch.autograd.grad(values, tensors, weights)
    with torch.no_grad():  # Nothing is kept for a backward then.
        again, _ = op(cell)(*tensors, **options)
    assert torch.equal(again, outputs)
    return [value.detach() for value in values] + list(grads)


def share(value: Tensor, exact: Tensor) -> float:
    """Return the largest error, as a share of the largest value."""
    return float((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-9)) if value.numel() else 0.0


@each_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(cell: str, sizes: tuple[int, ...], reverse: bool) -> None:
    tensors = draw(cell, *sizes)
    exact = results(cell, tensors, reverse=reverse)
    found = results(cell, [tensor.float() for tensor in tensors], reverse=reverse, native=True)
    assert max(map(share, found, exact)) < 1e-4
    for value, want in zip(found, exact, strict=True):
        assert (value.shape, value.dtype, value.is_contiguous()) == (want.shape, torch.float32, True)


@each_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[6, 2, 4], [1, 1, 3], [5, 5, 5]], ids=str)
def test_sequences_of_several_lengths(
    cell: str, reverse: bool, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("str_triton.ops.schedule.CHUNK", 50)
    batch = 4 * len(lengths) - 1  # several groups of sequences, the last one not full
    tensors, options = draw(cell, 6, batch, 8, 4), {"lengths": torch.tensor(4 * lengths)[:batch], "reverse": reverse}
    tensors[0][5] = torch.inf  # Nothing behind the end of a sequence is read; six steps are read where there are six.
    tensors[0][5, options["lengths"] == 6] = 0.3
    found = results(cell, [tensor.float() for tensor in tensors], native=True, **options)
    assert max(map(share, found, results(cell, tensors, **options))) < 1e-4
    behind = torch.arange(6)[:, None] >= options["lengths"]
    assert not found[0][behind].any()


@each_cell
def test_many_threads_and_pieces_of_time(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of four sequences go to the threads; a long sequence is walked piece by piece."""
    monkeypatch.setattr("str_triton.native.recurrent.FEW", 0)
    monkeypatch.setattr("str_triton.ops.schedule.CHUNK", 1000)
    tensors, before = draw(cell, 20, 11, 24, 5), torch.get_num_threads()
    exact = results(cell, tensors)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = results(cell, [tensor.float() for tensor in tensors], native=True)
            assert max(map(share, found, exact)) < 1e-4
    finally:
        torch.set_num_threads(before)


@each_cell
def test_what_runs_in_the_loop_of_torch(cell: str) -> None:
    """float64, and no component: the same bits with and without `native`."""
    tensors = draw(cell, 6, 3, 8, 4)
    nothing = [tensor.float() for tensor in draw(cell, 6, 3, 8, 0)]
    for own, options in ((tensors, {}), (nothing, {})):
        for native, loop in zip(results(cell, own, native=True, **options), results(cell, own, **options), strict=True):
            assert torch.equal(native, loop)


@each_cell
def test_half_precision_tensors(cell: str) -> None:
    """Arithmetic is float32, in both loops."""
    tensors = [tensor.bfloat16() for tensor in draw(cell, 6, 3, 8, 4)]
    native, loop = results(cell, tensors, native=True), results(cell, tensors)
    assert max(share(value, want.double()) for value, want in zip(native, loop, strict=True)) < 0.02
    assert {value.dtype for value in native} == {torch.bfloat16}


@each_cell
def test_not_a_number_stays_in_its_sequence(cell: str) -> None:
    tensors = [tensor.float() for tensor in draw(cell, 6, 3, 8, 4)]
    tensors[0][2, 1] = torch.nan
    outputs, _ = op(cell)(*tensors, native=True)
    assert torch.equal(outputs.isnan().any(2), torch.tensor([[False] * 3] * 2 + [[False, True, False]] * 4))


def test_torch_func_and_fake_tensors() -> None:
    tensors = [tensor.float() for tensor in draw("gru", 6, 3, 8, 4)]

    def loss(u: Tensor, native: bool = True) -> Tensor:
        return op("gru")(tensors[0], u, *tensors[2:], native=native)[0].square().sum()

    grad = torch.func.grad(loss)(tensors[1])
    torch.testing.assert_close(grad, torch.func.grad(lambda u: loss(u, False))(tensors[1]), rtol=1e-4, atol=1e-5)
    both = torch.func.vmap(torch.func.grad(loss))(torch.stack([tensors[1], 2 * tensors[1]]))
    torch.testing.assert_close(both[0], grad, rtol=1e-4, atol=1e-5)
    arguments = "gru", *tensors[:2], tensors[3], tensors[4], tensors[0].new_empty(0), [tensors[5]], None, False
    for save in (False, True):
        torch.library.opcheck(torch.ops.str_triton.low_rank_rnn.default, (*arguments, save, None, True))
