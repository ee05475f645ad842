"""low_rank_plan and the layout of the kernels, by arithmetic. What compiled kernels take: test_kernel_resources.py."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from str_triton import Plan, low_rank_plan, shared_memory_limit
from str_triton.ops.low_rank_cell import CELLS
from str_triton.ops.low_rank_gpu import chip
from str_triton.ops.low_rank_plan import LARGEST_RANK, layout, padded, resident_bytes

RTX3090, A100, H100, MI300 = (1024 * kib for kib in (99, 163, 227, 64))


@pytest.mark.parametrize(
    ("kind", "cell", "sizes", "training"),
    [
        ("loop", "gru", (512, 32, 64), True),
        ("loop", "gru", (128, 128, 16), True),
        ("dense", "gru", (128, 128, 64), True),
        ("dense", "gru", (96, 58, 64), True),
        ("loop", "gru", (96, 48, 64), True),
        ("dense", "gru", (64, 4, 1), False),
        ("loop", "gru", (512, 256, 1), False),
        ("dense", "lstm", (128, 8, 64), True),
        ("loop", "lstm", (256, 64, 64), True),
        ("dense", "lstm", (256, 65, 64), True),
        ("loop", "lstm", (512, 256, 1), False),
        ("loop", "fastgrnn", (8, 8, 1), False),
        ("loop", "mgu", (128, 128, 64), True),
    ],
)
def test_plan(kind, cell, sizes, training):
    assert low_rank_plan(cell, *sizes, torch.float32, training=training) == Plan(kind)


def test_plan_of_what_there_is_not():
    with pytest.raises(ValueError, match=r"'fastgrnn'.*'gru'.*got 'rnn'"):
        low_rank_plan("rnn", 512, 32, 64, torch.float32)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        low_rank_plan("gru", 512, 0, 64, torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be float16, .*, got torch.int8"):
        low_rank_plan("gru", 512, 32, 64, torch.int8)


def test_shared_memory_limit_is_a_constant_of_compiled_code():
    assert vars(shared_memory_limit) == vars(torch.compiler.assume_constant_result(lambda: None))


def test_shared_memory_limit(monkeypatch):
    assert shared_memory_limit(torch.device("cpu")) is None
    nvidia = SimpleNamespace(shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=227 * 1024)
    for properties, limit in ((nvidia, 227 * 1024), (SimpleNamespace(shared_memory_per_block=65536), 65536)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, known=properties: known)
        assert shared_memory_limit(torch.device("cuda")) == limit


@pytest.mark.parametrize(
    ("hip", "warp_size", "expected"), [(None, 32, "nvidia"), ("7.0", 64, "cdna"), ("7.0", 32, "rdna")]
)
def test_chip(hip, warp_size, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=warp_size))
    assert chip(torch.device("cuda")) == expected


def test_a_large_backward_loads_nothing_ahead():
    """It would spill, and so would any backward on AMD's chips for games."""
    for hidden, name, backward, ahead in (
        (256, "nvidia", True, True),
        (512, "nvidia", True, False),
        (512, "nvidia", False, True),
        (256, "rdna", True, False),
    ):
        assert layout(CELLS["gru"], hidden, 16, torch.bfloat16, H100, backward, name).ahead == ahead


def kind(hidden: int, rank: int, dtype: torch.dtype, shared_memory: int, cell: str = "gru", **options: object) -> str:
    return low_rank_plan(cell, hidden, rank, 64, dtype, shared_memory=shared_memory, **options).kind


@pytest.mark.parametrize(
    ("hidden", "rank", "dtype", "shared_memory", "expected"),
    [
        (512, 32, torch.bfloat16, H100, "resident"),
        (512, 32, torch.bfloat16, RTX3090, "dense"),  # streamed
        (512, 32, torch.float32, H100, "dense"),
        (256, 16, torch.float32, H100, "resident"),
        (256, 16, torch.bfloat16, MI300, "resident"),
        (256, 16, torch.float32, MI300, "dense"),
        (1024, 64, torch.bfloat16, H100, "dense"),
        (200, 50, torch.bfloat16, H100, "resident"),
        (200, 51, torch.bfloat16, H100, "dense"),  # more than a quarter of full rank
        (128, 8, torch.bfloat16, H100, "dense"),  # cuDNN's persistent kernels
        (144, 8, torch.bfloat16, H100, "resident"),
    ],
)
def test_kind(hidden, rank, dtype, shared_memory, expected):
    assert kind(hidden, rank, dtype, shared_memory) == expected


def test_cudnn_serves_small_layers_unless_they_are_packed():
    small = 160, 8, torch.bfloat16, H100
    assert kind(*small, training=False) == "dense"
    assert kind(*small, training=True) == "resident"
    assert [kind(size, 8, torch.bfloat16, H100, training=False) for size in (192, 193)] == ["dense", "resident"]
    assert kind(*small, training=False, packed=True) == "resident"
    assert kind(128, 8, torch.bfloat16, H100, packed=True) == "resident"


def test_the_plan_knows_the_precision():
    large, small = (256, 32, torch.float32, H100), (256, 16, torch.float32, H100)
    kinds = [[kind(*size, precision=p) for p in ("ieee", "tf32", "tf32x3")] for size in (large, small)]
    assert kinds == [["dense", "resident", "resident"], ["resident"] * 3]


def test_a_cell_that_torch_has_not_runs_the_kernels():
    for cell in ("fastgrnn", "mgu"):
        assert kind(64, 64, torch.float32, H100, cell) == "resident"
        assert kind(2048, 16, torch.float32, H100, cell) == "streamed"


def test_resident_factors_take_at_most_six_tenths_of_the_shared_memory():
    """3 factors of 256 x 64 in bfloat16, 96 KiB."""
    kinds = [layout(CELLS["mgu"], 256, 64, torch.bfloat16, 160 * 1024 - i, False).kind for i in (0, 1)]
    assert kinds == ["resident", "streamed"]


@pytest.mark.parametrize(("rank", "dtype", "rows"), [(16, 2, 128), (64, 2, 64), (64, 4, 32), (512, 2, 16)])
def test_a_streamed_tile_of_a_factor_has_8_kib(rank, dtype, rows):
    """If it has at least 16 rows, and at most 256 bytes of a column."""
    plan = layout(CELLS["gru"], 1024, rank, {2: torch.bfloat16, 4: torch.float32}[dtype], H100, True)
    assert (plan.kind, plan.block_hidden, plan.warps) == ("streamed", rows, rows // 16)


def test_hidden_sizes_are_padded_to_multiples_of_16():
    assert [padded(size) for size in (1, 16, 100, 112)] == [16, 16, 112, 112]


def test_the_largest_rank_has_a_layout():
    assert layout(CELLS["gru"], 512, LARGEST_RANK, torch.bfloat16, H100, True).block_rank == LARGEST_RANK
    with pytest.raises(ValueError, match=rf"{LARGEST_RANK + 1}.*{LARGEST_RANK}"):
        layout(CELLS["gru"], 512, LARGEST_RANK + 1, torch.bfloat16, H100, True)


@pytest.mark.parametrize("chip", ["nvidia", "cdna", "rdna"])
@pytest.mark.parametrize("shared_memory", [RTX3090, A100, H100, MI300])
@pytest.mark.parametrize("cell", CELLS)
def test_layouts_fit(cell, shared_memory, chip):
    of, dtypes = CELLS[cell], (torch.bfloat16, torch.float32, torch.float64)
    for hidden, rank, dtype, backward in product((1, 20, 128, 300, 512, 1024), (1, 16, 33, 128), dtypes, (False, True)):
        plan = layout(of, hidden, rank, dtype, shared_memory, backward, chip)
        assert plan.block_rank >= max(16, rank)
        assert plan.block_batch == (8 if chip == "nvidia" else 16)
        blocks = plan.block_hidden, plan.block_rank, plan.block_batch, dtype.itemsize, plan.warps
        if plan.kind == "resident":
            assert plan.block_hidden >= hidden
            assert resident_bytes(of, *blocks) <= shared_memory
        else:
            tiles = (of.gates + 1) * plan.block_hidden * plan.block_rank * dtype.itemsize
            assert tiles <= 80 * 1024
            assert 16 * plan.warps == plan.block_hidden  # No row is computed twice.
