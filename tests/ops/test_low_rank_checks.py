"""The arguments of the low-rank recurrent ops that are wrong."""

import re
from dataclasses import replace

import pytest
import torch

from str_triton.ops.low_rank_cell import CELLS
from str_triton.ops.low_rank_checks import rnn_precision
from tests.ops.low_rank_cases import example, op

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)


def wrong(cell, name, tensor):
    case = example(cell)
    return replace(case, tensors=case.tensors | {name: tensor})


@EVERY_CELL
@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("u", torch.zeros(3), ValueError, r"u .*\[\d+, r\].* \(3,\)"),
        ("u", torch.zeros(7, 3), ValueError, r"u .*\(\d+, 3\).*gates_x .* \(7, 3\)"),
        ("m", torch.zeros(4), ValueError, r"m .*\(3,\).* u .* \(4,\)"),
        ("v", torch.zeros(3, 6), ValueError, r"v .*\(6, 3\).* \(3, 6\)"),
        ("h0", torch.zeros(6, 4).double(), ValueError, r"h0 .*\(4, 6\).* \(6, 4\)"),
        ("h0", torch.zeros(4, 6), TypeError, r"h0 .*float32.* gates_x .*float64"),
        ("m", torch.zeros(3).long(), TypeError, r"m .*float16.* torch.int64"),
        ("v", "factor", TypeError, r"v .*float16.* str"),
        ("u", torch.zeros(1, 3, device="meta"), ValueError, r"u .*meta.* gates_x .*cpu"),
    ],
)
def test_a_wrong_tensor(cell, name, tensor, error, message):
    with pytest.raises(error, match=message):
        wrong(cell, name, tensor).call(op(cell))


@EVERY_CELL
def test_the_width_of_gates_x(cell):
    gates = CELLS[cell].gates
    columns = {1: "H", 2: "2 H", 3: "3 H", 4: "4 H"}[gates]
    for wrong_size in ((5, 4), (5, 4, 6 * gates + 1) if gates > 1 else (24,)):
        with pytest.raises(ValueError, match=rf"\[T, B, {columns}\], got {re.escape(str(wrong_size))}"):
            wrong(cell, "gates_x", torch.zeros(wrong_size).double()).call(op(cell))


@EVERY_CELL
def test_no_time_step(cell):
    with pytest.raises(ValueError, match=r"gates_x of shape \(0, 4, \d+\)"):
        example(cell, steps=0).call(op(cell))


@EVERY_CELL
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([5, 0, 1, 2]), ValueError, "lengths .*1 to 5.* 0"),
        (torch.tensor([5, 6, 1, 2]), ValueError, "lengths .*1 to 5.* 6"),
        (torch.tensor([5, 1]), ValueError, r"lengths .*\(4,\).* \(2,\)"),
        (torch.tensor([5.0, 1, 2, 3]), TypeError, "lengths .*int64.* torch.float32"),
        ([5, 1, 2, 3], TypeError, "lengths .*int64.* list"),
        (torch.ones(4, dtype=torch.int64, device="meta"), ValueError, "lengths .*meta.* gates_x .*cpu"),
    ],
)
def test_wrong_lengths(cell, lengths, error, message):
    with pytest.raises(error, match=message):
        replace(example(cell), lengths=lengths).call(op(cell))


@EVERY_CELL
def test_an_unknown_precision(cell):
    case = example(cell)
    with pytest.raises(ValueError, match=r"precision .*'ieee', 'tf32', 'tf32x3' or None.* 'high'"):
        op(cell)(*case.tensors.values(), precision="high")


@pytest.mark.parametrize(("torchs", "ours"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_the_precision_is_that_of_torchs_layers(torchs, ours, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", torchs)
    assert rnn_precision() == ours
