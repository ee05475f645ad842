"""The GPU's part of low_rank_plan, a pure function. What compiled kernels take is in test_kernel_resources.py."""

from itertools import product

import pytest
import torch

from str_triton import low_rank_plan
from str_triton.ops.low_rank_triton import _resident_bytes, layout
from str_triton.ops.time_loop import CELLS

A100, H100, MI300 = 163 * 1024, 227 * 1024, 64 * 1024


def kind(hidden: int, rank: int, dtype: torch.dtype, shared_memory: int, cell: str = "gru") -> str:
    return low_rank_plan(cell, hidden, rank, 64, dtype, shared_memory=shared_memory).kind


@pytest.mark.parametrize(
    ("hidden", "rank", "dtype", "shared_memory", "expected"),
    [
        (512, 32, torch.bfloat16, H100, "resident"),
        (512, 32, torch.bfloat16, A100, "streamed"),
        (512, 32, torch.float32, H100, "streamed"),
        (128, 8, torch.float32, H100, "resident"),
        (256, 16, torch.float32, H100, "streamed"),
        (256, 16, torch.bfloat16, MI300, "resident"),
        (256, 16, torch.float32, MI300, "streamed"),
        (1024, 64, torch.bfloat16, H100, "streamed"),
        (1024, 64, torch.float32, H100, "dense"),
        (1024, 129, torch.float16, H100, "dense"),
        (1025, 16, torch.float16, H100, "dense"),
        (64, 16, torch.float32, H100, "resident"),
        (64, 17, torch.float32, H100, "dense"),
        (2048, 1024, torch.float32, H100, "dense"),
    ],
)
def test_kind(hidden, rank, dtype, shared_memory, expected):
    assert kind(hidden, rank, dtype, shared_memory) == expected


def test_the_backward_asks_for_more():
    sizes = "gru", 256, 16, 64, torch.float32
    kinds = [low_rank_plan(*sizes, shared_memory=H100, training=training).kind for training in (False, True)]
    assert kinds == ["resident", "streamed"]


def test_fastgrnn_has_no_dense_kernel():
    assert kind(64, 64, torch.float32, H100, "fastgrnn") == "resident"
    assert kind(2048, 16, torch.float32, H100, "fastgrnn") == "streamed"


@pytest.mark.parametrize("shared_memory", [A100, H100, MI300])
@pytest.mark.parametrize("cell", CELLS)
def test_layouts_fit(cell, shared_memory):
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for hidden, rank, dtype, backward in product((1, 20, 128, 300, 512, 1024), (1, 16, 33, 128), dtypes, (False, True)):
        plan = layout(cell, hidden, rank, dtype, shared_memory, backward)
        assert plan.block_rank >= max(16, rank)
        if plan.kind == "resident":
            blocks = plan.block_hidden, plan.block_rank, dtype.itemsize, plan.warps, plan.stages
            assert plan.block_hidden >= hidden
            assert _resident_bytes(CELLS[cell], *blocks, backward) <= shared_memory
        else:
            tiles = (CELLS[cell] + 1) * plan.block_hidden * plan.block_rank * dtype.itemsize
            assert plan.stages == 1 or 2 * tiles < shared_memory / 2
            assert tiles <= 80 * 1024
