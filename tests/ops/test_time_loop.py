"""The arguments of the low-rank recurrent ops that are wrong, and the plan."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from str_triton import Plan, low_rank_plan, shared_memory_limit
from str_triton.ops.time_loop import CELLS
from tests.ops.low_rank_cases import example, op

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)


def wrong(cell, name, tensor):
    case = example(cell)
    return replace(case, tensors=case.tensors | {name: tensor})


@EVERY_CELL
@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("gates_x", torch.zeros(5, 4).double(), ValueError, r"gates_x must have shape \[T, B, .*H\], got \(5, 4\)"),
        ("u", torch.zeros(3), ValueError, r"u must be a matrix \[\d+, r\], got shape \(3,\)"),
        ("u", torch.zeros(7, 3), ValueError, r"u must have shape \(\d+, 3\) to fit gates_x .*, got \(7, 3\)"),
        ("m", torch.zeros(4), ValueError, r"m must have shape \(3,\) to fit .* and u of shape .*, got \(4,\)"),
        ("v", torch.zeros(3, 6), ValueError, r"v must have shape \(6, 3\) .*, got \(3, 6\)"),
        ("h0", torch.zeros(6, 4).double(), ValueError, r"h0 must have shape \(4, 6\) .*, got \(6, 4\)"),
        ("h0", torch.zeros(4, 6), TypeError, r"h0 is torch.float32, gates_x torch.float64: give both in one dtype"),
        ("m", torch.zeros(3).long(), TypeError, r"m must be a tensor of float16, .*, got torch.int64"),
        ("v", "factor", TypeError, r"v must be a tensor of float16, .*, got str"),
        ("u", torch.zeros(1, 3, device="meta"), ValueError, r"u is on meta, gates_x on cpu: move them to one device"),
    ],
)
def test_a_wrong_tensor(cell, name, tensor, error, message):
    with pytest.raises(error, match=message):
        wrong(cell, name, tensor).call(op(cell))


@EVERY_CELL
def test_no_time_step(cell):
    with pytest.raises(ValueError, match=r"gates_x of shape \(0, 4, \d+\) has no time step: give at least one"):
        example(cell, steps=0).call(op(cell))


@EVERY_CELL
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([5, 0, 1, 2]), ValueError, "lengths must be from 1 to 5, the steps of gates_x, got 0"),
        (torch.tensor([5, 6, 1, 2]), ValueError, "lengths must be from 1 to 5, the steps of gates_x, got 6"),
        (torch.tensor([5, 1]), ValueError, r"lengths must have shape \(4,\), one for each sequence, got \(2,\)"),
        (torch.tensor([5.0, 1, 2, 3]), TypeError, "lengths must be a tensor of int64, got torch.float32"),
        ([5, 1, 2, 3], TypeError, "lengths must be a tensor of int64, got list"),
        (torch.ones(4, dtype=torch.int64, device="meta"), ValueError, "lengths is on meta, gates_x on cpu"),
    ],
)
def test_wrong_lengths(cell, lengths, error, message):
    with pytest.raises(error, match=message):
        replace(example(cell), lengths=lengths).call(op(cell))


@pytest.mark.parametrize(
    ("kind", "cell", "sizes", "training"),
    [
        ("loop", "gru", (512, 32, 64), True),
        ("loop", "gru", (128, 128, 16), True),
        ("dense", "gru", (128, 128, 64), True),
        ("dense", "gru", (64, 4, 1), False),
        ("loop", "gru", (512, 256, 1), False),
        ("dense", "lstm", (128, 8, 64), True),
        ("loop", "lstm", (256, 64, 64), True),
        ("dense", "lstm", (256, 65, 64), True),
        ("loop", "lstm", (512, 256, 1), False),
        ("loop", "fastgrnn", (8, 8, 1), False),
    ],
)
def test_plan(kind, cell, sizes, training):
    assert low_rank_plan(cell, *sizes, torch.float32, training=training) == Plan(kind)


def test_plan_of_what_there_is_not():
    with pytest.raises(ValueError, match="cell must be 'gru', 'lstm' or 'fastgrnn', got 'rnn'"):
        low_rank_plan("rnn", 512, 32, 64, torch.float32)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        low_rank_plan("gru", 512, 0, 64, torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be float16, .*, got torch.int8"):
        low_rank_plan("gru", 512, 32, 64, torch.int8)


def test_shared_memory_limit(monkeypatch):
    assert shared_memory_limit(torch.device("cpu")) is None
    nvidia = SimpleNamespace(shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=227 * 1024)
    for properties, limit in ((nvidia, 227 * 1024), (SimpleNamespace(shared_memory_per_block=65536), 65536)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, known=properties: known)
        assert shared_memory_limit(torch.device("cuda")) == limit
