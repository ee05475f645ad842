"""The recombination kernel in Triton's interpreter, against the CPU implementation."""

import pytest
import torch

from str_triton.ops import singular_value_threshold as op

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def decomposition(batch: int, m: int, n: int, k: int, ranks: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Factors and a decreasing spectrum; the vectors of pruned components are NaN: whoever reads them shows it."""
    u, vh = torch.randn(batch, k, m, dtype=dtype).mT, torch.randn(batch, k, n, dtype=dtype)
    s = torch.rand(batch, k, dtype=dtype).add(0.1).sort(descending=True).values
    for i, rank in enumerate(ranks):
        s[i, rank:] = 0
        u[i, :, rank:] = torch.nan
        vh[i, rank:] = torch.nan
    return u, s, vh


def assert_recombined(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, ranks: list[int], dtype: torch.dtype) -> None:
    out = op._recombine_triton(u, s, vh, dtype)
    assert out.dtype == dtype
    assert out.is_contiguous()
    for i, rank in enumerate(ranks):
        expected = (u[i, :, :rank] * s[i, :rank]) @ vh[i, :rank]
        # The interpreter truncates where it stores bfloat16: one unit in the last place.
        rtol = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
        torch.testing.assert_close(out[i].to(u.dtype), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype"),
    [(1, 1, 1, torch.float32), (16, 64, 16, torch.float32), (70, 130, 20, torch.float32), (65, 33, 33, torch.float64)]
    + [(5, 3, 3, dtype) for dtype in DTYPES],
    ids=str,
)
def test_prefix(m, n, k, dtype):
    ranks = [0, 1, k, min(k, 17)]
    compute = torch.promote_types(dtype, torch.float32)
    u, s, vh = decomposition(len(ranks), m, n, k, ranks, compute)
    assert_recombined(u, s, vh, ranks, dtype)
    assert_recombined(u.contiguous(), s, vh.mT.contiguous().mT, ranks, dtype)


def test_spectrum_longer_than_one_block():
    ranks = [0, 7, 1023, 1024, 1025, 2100]
    assert_recombined(*decomposition(len(ranks), 4, 3, 2100, ranks, torch.float32), ranks, torch.float32)


@pytest.mark.parametrize(("m", "n"), [(20, 30), (30, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(m, n, dtype):
    w, raw = torch.randn(3, m, n).to(dtype), torch.tensor([[0.5], [1.0], [9.0]])
    w[0, 0, 0] = torch.nan
    out, *saved = op._forward_triton(w, raw, "exp")
    expected, *expected_saved = op._forward(w, raw, "exp")
    assert out[0].isnan().all()
    assert out[2].eq(0).all()
    rtol = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=rtol, equal_nan=True)
    torch.testing.assert_close(saved, expected_saved, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty(shape):
    out, *_ = op._forward_triton(torch.empty(shape), torch.zeros(1), "exp")
    assert out.shape == shape
