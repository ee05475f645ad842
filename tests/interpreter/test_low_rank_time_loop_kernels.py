"""The time loops' kernels in Triton's interpreter, through their launchers, against the equations in float64."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from str_triton.ops import low_rank_gpu as launcher
from str_triton.ops.low_rank_cell import CELLS, Cell
from str_triton.ops.low_rank_plan import Plan
from tests.messages import holding
from tests.ops.low_rank_cases import TOLERANCE, Case, assert_matches, differentiate, example, expected, op
from tests.ops.soft_threshold_cases import poisoned_allocations

KINDS = ["resident", "resident, ahead", "streamed"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_allocations():
        yield


@pytest.fixture(autouse=True)
def _launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops on the CPU are what they are on a GPU, but for the instructions that only NVIDIA has."""
    monkeypatch.setattr(torch.ops.str_triton, "low_rank_rnn", launcher.forward)
    monkeypatch.setattr(torch.ops.str_triton, "low_rank_rnn_backward", launcher.backward)
    monkeypatch.setattr(launcher, "shared_memory_limit", lambda device: 227 * 1024)
    monkeypatch.setattr(launcher, "chip", lambda device: "interpreter")


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and would multiply those."""
    create_dot = InterpreterBuilder.create_dot

    def widened(x: object) -> object:
        if x.dtype.scalar == tl.bfloat16:
            return type(x)((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return x

    def dot(self: InterpreterBuilder, a: object, b: object, *others: object) -> object:
        return create_dot(self, widened(a), widened(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One tile of hidden units, or tiles of 16 of them. Two warps: the sum over the hidden units has two pieces."""

    def layout(cell: Cell, hidden: int, rank: int, *_: object) -> Plan:
        kind, *ahead = request.param.split(", ")
        block_hidden, block_rank = (max(16, 1 << (size - 1).bit_length()) for size in (hidden, rank))
        return Plan(kind, 16, block_hidden if kind == "resident" else 16, block_rank, 2, bool(ahead))

    monkeypatch.setattr(launcher, "layout", layout)
    return request.param


def check(case: Case) -> None:
    assert_matches(differentiate(op(case.cell), case), expected(case), TOLERANCE[case.tensors["gates_x"].dtype])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "rank", "lengths"),
    [(1, 1, 5, 1, "all"), (1, 18, 20, 3, "all"), (2, 18, 33, 17, "any order"), (2, 2, 4, 0, "all")],
)
def test_sizes(steps, batch, hidden, rank, lengths, cell, kind):
    check(example(cell, steps, batch, hidden, rank, lengths=lengths, dtype=torch.float32))


@pytest.mark.parametrize("cell", CELLS)
def test_no_sequence(cell):
    case = example(cell, 2, 0, 4, 2, dtype=torch.float32)
    got = differentiate(op(cell), case)
    assert got["outputs"].shape == (2, 0, 4)
    assert torch.equal(got["grad of u"], torch.zeros_like(case.tensors["u"]))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("lengths", "reverse"), [("all", True), ("falling", False), ("falling", True)])
def test_lengths_and_direction(lengths, reverse, cell, kind):
    """Three sequences: one of all steps, one of two, and one that ends after the first step."""
    check(example(cell, 3, 3, 20, 3, lengths=lengths, reverse=reverse, dtype=torch.float32))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, cell, kind):
    check(example(cell, 2, 3, 20, 3, lengths="falling", dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_stays_in_its_sequence_and_padding_is_not_read(reverse, cell, kind):
    case = example(cell, 3, 3, 5, 3, lengths="falling", reverse=reverse, dtype=torch.float32)
    assert case.lengths.tolist() == [3, 2, 1]
    case.tensors["gates_x"][2:, 1] = torch.nan
    case.grads[0][1:, 2] = torch.nan
    got = differentiate(op(cell), case)
    assert all(value.isfinite().all() for value in got.values())
    case.tensors["gates_x"][1, 0] = torch.nan
    outputs, *_ = case.call(op(cell))
    poisoned = slice(0, 2) if reverse else slice(1, 3)
    assert outputs[poisoned, 0].isnan().all()
    outputs[poisoned, 0] = got["outputs"][poisoned, 0]
    assert torch.equal(outputs, got["outputs"])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_gates_far_out_saturate(cell, kind):
    case = example(cell, 2, 3, 5, 2, dtype=torch.float32)
    case.tensors["gates_x"] *= 1000
    check(case)


@pytest.mark.parametrize("cell", CELLS)
def test_inference_saves_nothing(cell, kind):
    case = example(cell, 2, 3, 5, 3, lengths="any order", dtype=torch.float32)
    case.tensors["gates_x"].requires_grad_()
    want = case.call(op(cell))
    with torch.no_grad():
        got = case.call(op(cell))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_wrong_lengths(cell):
    case = example(cell, 3, 3, 5, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=holding("lengths .. 1 .. 3 .. gates_x .. 4")):
        replace(case, lengths=torch.tensor([1, 4, 3])).call(op(cell))


def test_a_rank_that_no_kernel_takes():
    case = example("gru", 2, 2, 4, 600, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"rank 600 .*512"):
        case.call(op("gru"))
