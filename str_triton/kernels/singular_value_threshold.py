"""U diag(s) V^T for a batch of thresholded spectra: the loop over components ends at the last one that is not zero.

A program computes one BLOCK_M x BLOCK_N tile of one matrix. s decreases, so the surviving components come first. The
program counts them on the device and loads no other singular vectors. All offsets are int64.
"""

import triton
import triton.language as tl

SPECTRUM_BLOCK = tl.constexpr(1024)  # Values of s looked at in one step.


@triton.jit
def _rank(p_s, k):
    """Return the index of the last component that is not zero, plus one. NaN is not zero."""
    rank = 0
    for start in range(0, k, SPECTRUM_BLOCK):
        i = start + tl.arange(0, SPECTRUM_BLOCK)
        s = tl.load(p_s + i, mask=i < k, other=0)
        rank = tl.maximum(rank, tl.max(tl.where(s != 0, i + 1, 0), axis=0))
    return rank


@triton.jit
def singular_value_threshold_recombine_kernel(
    p_u, p_s, p_vh, p_out, m, n, k,
    u_batch, u_row, u_col, vh_batch, vh_row, vh_col,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a tile of U diag(s) V^T, summed over the surviving components."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    batch = pid // tiles
    i_m = (pid % tiles) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_s += batch * k
    p_u += batch * u_batch + i_m[:, None] * u_row
    p_vh += batch * vh_batch + i_n[None, :] * vh_col

    compute = p_u.dtype.element_ty
    out = tl.zeros([BLOCK_M, BLOCK_N], compute)
    rank = _rank(p_s, k)
    for start in range(0, rank, BLOCK_K):
        i_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        s = tl.load(p_s + i_k, mask=i_k < rank, other=0)
        u = tl.load(p_u + i_k[None, :] * u_col, mask=(i_m[:, None] < m) & (i_k[None, :] < rank), other=0)
        vh = tl.load(p_vh + i_k[:, None] * vh_row, mask=(i_k[:, None] < rank) & (i_n[None, :] < n), other=0)
        out = tl.dot(u * s[None, :], vh, out, input_precision=PRECISION, out_dtype=compute)

    p_out += batch * m * n + i_m[:, None] * n + i_n[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=(i_m[:, None] < m) & (i_n[None, :] < n))
