"""Oracle 5: the low-rank time loops on a GPU, against the literal equations in float64 and against cuDNN."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from str_triton import low_rank_gru
from str_triton.ops import low_rank_gpu
from str_triton.ops.low_rank_cell import CELLS
from tests.ops.low_rank_cases import (
    TOLERANCE,
    Case,
    assert_matches,
    differentiate,
    example,
    expected,
    full_rank,
    op,
    relative_error,
)
from tests.ops.soft_threshold_cases import poisoned_allocations

pytestmark = pytest.mark.gpu
# Around the borders of tiles, of sequences per program, and of what stays on the chip.
SIZES = [(7, 1, 5, 1), (5, 33, 100, 10), (5, 16, 128, 16), (3, 17, 257, 16), (3, 20, 512, 32), (3, 5, 1000, 100)]


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


def on_gpu(case: Case) -> Case:
    tensors = {name: None if tensor is None else tensor.cuda() for name, tensor in case.tensors.items()}
    lengths = None if case.lengths is None else case.lengths.cuda()
    return replace(case, tensors=tensors, lengths=lengths, grads=[grad.cuda() for grad in case.grads])


def exactly(cell: str) -> Callable:
    """The op with float32 products in full precision, to which the tolerances belong."""
    return partial(op(cell), precision="ieee")


def check(case: Case) -> None:
    assert_matches(differentiate(exactly(case.cell), on_gpu(case)), expected(case), TOLERANCE[case.grads[0].dtype])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 1e-5), ("tf32x3", 2e-5), ("tf32", 5e-3), (None, 5e-3)])
def test_precisions(precision, tolerance, cell):
    case = example(cell, 5, 16, 256, 16, dtype=torch.float32)
    assert_matches(differentiate(partial(op(cell), precision=precision), on_gpu(case)), expected(case), tolerance)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sizes_and_dtypes(dtype, size, cell):
    check(example(cell, *size, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", ["all", "falling", "any order"])
@pytest.mark.parametrize("size", [(9, 37, 64, 8), (9, 37, 1000, 64)], ids=str)
def test_lengths_and_direction(size, lengths, reverse, cell):
    check(example(cell, *size, lengths=lengths, reverse=reverse, dtype=torch.float32))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_as_resident(dtype, cell, monkeypatch):
    case = on_gpu(example(cell, 50, 40, 128, 16, lengths="any order", dtype=dtype))
    resident = differentiate(exactly(cell), case)
    monkeypatch.setattr(low_rank_gpu, "shared_memory_limit", lambda device: 1024)
    assert low_rank_gpu.layout(CELLS[cell], 128, 16, dtype, 1024, backward=True).kind == "streamed"
    streamed = differentiate(exactly(cell), case)
    want = {name: value.cpu().double() for name, value in resident.items()}
    assert_matches(streamed, want, TOLERANCE[dtype])


@pytest.mark.parametrize("cell", CELLS)
def test_many_steps(cell):
    check(example(cell, 1000, 20, 64, 8, lengths="any order", dtype=torch.float32))


def test_torchs_gru_at_full_rank(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")  # Ours follows.
    steps, batch, hidden = 30, 20, 48
    layer = nn.GRU(5, hidden).cuda()
    x, h0 = torch.randn(steps, batch, 5, device="cuda"), torch.randn(1, batch, hidden, device="cuda")
    outputs, h = layer(x, h0)
    u, m, v = (tensor.cuda() for tensor in full_rank(layer.weight_hh_l0.detach().cpu(), "orthogonal"))
    gates_x = nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    got, got_h = low_rank_gru(gates_x, u, m, v, layer.bias_hh_l0, h0[0])
    assert max(relative_error(got, outputs), relative_error(got_h, h[0])) <= 1e-5


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_inputs_give_the_same_bits(cell):
    case = on_gpu(example(cell, 40, 50, 256, 16, lengths="any order", dtype=torch.bfloat16))
    first, second = (differentiate(op(cell), case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cell", CELLS)
def test_wrong_lengths_on_the_gpu_stay_within_the_tensors(cell):
    """They are not checked, which would wait for the GPU."""
    case = on_gpu(example(cell, 4, 3, 20, 3, lengths="any order", reverse=True, dtype=torch.float32))
    differentiate(op(cell), replace(case, lengths=torch.tensor([0, 4, 9], device="cuda")))
    torch.cuda.synchronize()


def test_more_than_two_to_the_31_elements():
    """gates_x alone has as many: the last steps of the last sequences lie behind."""
    steps, batch, hidden, rank = 701, 1025, 1000, 16
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    gates_x = torch.zeros(steps, batch, 3 * hidden, dtype=torch.bfloat16, device="cuda")
    gates_x[-1] = torch.randn(batch, 3 * hidden, dtype=torch.bfloat16, device="cuda")
    u, v = (torch.zeros(rows, rank, dtype=torch.bfloat16, device="cuda") for rows in (3 * hidden, hidden))
    h0 = torch.zeros(batch, hidden, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        outputs, _ = low_rank_gru(gates_x, u, u.new_ones(rank), v, None, h0)
    _, z, n = gates_x[-1].float().chunk(3, 1)
    want = (1 - z.sigmoid()) * n.tanh()
    torch.testing.assert_close(outputs[-1].float(), want, rtol=2**-6, atol=2**-6)
    assert (outputs[:-1] == 0).all()


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_in_one_graph(cell):
    torch.compiler.reset()
    case = on_gpu(example(cell, 20, 6, 32, 4, dtype=torch.float32))
    eager = differentiate(op(cell), case)
    compiled = differentiate(torch.compile(op(cell), fullgraph=True), case)
    assert_matches(compiled, {name: value.cpu().double() for name, value in eager.items()}, 1e-6)
