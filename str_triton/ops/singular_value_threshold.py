"""Soft threshold of a matrix's singular values: F(W) = U S(sigma) V^T, whose rank is learned with the threshold.

Derivation of the gradients: docs/derivations.md. Kernel: kernels/singular_value_threshold.py.

The registered ops see a batch of matrices [batch, m, n] and a raw threshold of one element or of shape [batch, 1].
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from str_triton.ops import soft_threshold  # noqa: F401  registers the op that thresholds the spectrum
from str_triton.ops.registration import differentiable, function, is_strict_export, op
from str_triton.ops.tensors import check_tensors, compute_dtype
from str_triton.ops.thresholds import threshold_function


def _decompose(w: Tensor, raw: Tensor, g: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the thin SVD U, sigma, V^T, and s = S(sigma). The spectrum of a matrix that is not finite is NaN."""
    finite = w.isfinite().flatten(1).all(1)
    w = torch.where(finite[:, None, None], w, 0).to(compute_dtype(w, raw))
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    sigma = torch.where(finite[:, None], sigma, torch.nan)
    alpha = threshold_function(g).value(raw.to(u.dtype))
    return u, sigma, vh, torch.ops.str_triton.soft_threshold(sigma, alpha)


def _forward(w: Tensor, raw: Tensor, g: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(w.device.type, enabled=False):
        u, sigma, vh, s = _decompose(w, raw, g)
        rank = int((s != 0).sum(1).max()) if s.numel() else 0  # sigma decreases: what survives is a prefix.
        out = (u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank]
    return out.to(w.dtype), u, sigma, vh, s


def _backward(
    grad: Tensor, u: Tensor, sigma: Tensor, vh: Tensor, s: Tensor, raw: Tensor, g: str
) -> tuple[Tensor, Tensor]:
    """Return dL/dW, and dL/draw through the spectrum's op: dL/ds is the diagonal of M = U^T grad V."""
    grad_w = grad.to(u.dtype)
    minus, plus, outer = _divided_differences(sigma, s)
    with torch.autocast(grad.device.type, enabled=False):
        # U core V^T is the part inside the row and column space; outer scales a rectangular W's part outside of it.
        tall = u.shape[1] >= vh.shape[2]
        y = grad_w @ vh.mT if tall else u.mT @ grad_w
        inner = u.mT @ y if tall else y @ vh.mT
        core = (minus * (inner + inner.mT) + plus * (inner - inner.mT)) / 2
        if tall:
            grad_w = (u @ (core - inner * outer[:, None, :]) + y * outer[:, None, :]) @ vh
        else:
            grad_w = u @ ((core - inner * outer[:, :, None]) @ vh + y * outer[:, :, None])
        grad_s = inner.diagonal(dim1=1, dim2=2).contiguous()
        slope = threshold_function(g).derivative(raw.to(u.dtype))
        _, grad_raw = torch.ops.str_triton.soft_threshold_backward(grad_s, s, slope, False)
    return grad_w.to(grad.dtype), grad_raw.to(raw.dtype)


def _divided_differences(sigma: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (s_i - s_j) / (sigma_i - sigma_j), (s_i + s_j) / (sigma_i + sigma_j) and s_i / sigma_i, all within [0, 1].

    S is linear on either side of the threshold, so the first is 1 where both survive and 0 where neither does. Where
    one survives, the distance is at least its s, for the other sigma is at most the threshold.
    """
    s_i, s_j = s[:, :, None], s[:, None, :]
    sigma_i, sigma_j = sigma[:, :, None], sigma[:, None, :]
    alive_i, alive_j = s_i != 0, s_j != 0
    minus = (s_i - s_j) / torch.where(alive_i ^ alive_j, sigma_i - sigma_j, 1)
    minus = torch.where(alive_i & alive_j, 1, minus)
    plus = (s_i + s_j) / torch.where(alive_i | alive_j, sigma_i + sigma_j, 1)
    return minus, plus, s / torch.where(s != 0, sigma, 1)


def _forward_triton(w: Tensor, raw: Tensor, g: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(w.device.type, enabled=False):
        u, sigma, vh, s = _decompose(w, raw, g)
    return _recombine_triton(u, s, vh, w.dtype), u, sigma, vh, s


def _recombine_triton(u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute U diag(s) V^T in one launch: a program per tile of a matrix."""
    from str_triton.kernels import singular_value_threshold as kernels

    (batch, m, k), n = u.shape, vh.shape[2]
    out = u.new_empty((batch, m, n), dtype=dtype)
    block_m, block_n, block_k = _tile(m, n, u.dtype)
    if out.numel():
        with torch.cuda.device_of(u):
            kernels.singular_value_threshold_recombine_kernel[(batch * -(-m // block_m) * -(-n // block_n),)](
                u, s, vh, out, m, n, k, *u.stride(), *vh.stride(),
                PRECISION=_dot_precision(u.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            )  # fmt: skip
    return out


def _tile(m: int, n: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return BLOCK_M, BLOCK_N, BLOCK_K: powers of two from 16, tl.dot's least, to what the registers hold."""
    largest = 32 if dtype == torch.float64 else 64
    block_m, block_n = (min(largest, max(16, 1 << (size - 1).bit_length())) for size in (m, n))
    return block_m, block_n, 16


def _dot_precision(dtype: torch.dtype) -> str:
    """Return tf32 only where torch's own matrix products may use it. Not on ROCm: there it depends on the chip."""
    may = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if may and dtype == torch.float32 and torch.version.hip is None else "ieee"


@op(
    "singular_value_threshold(Tensor w, Tensor raw, str g) -> "
    "(Tensor out, Tensor u, Tensor sigma, Tensor vh, Tensor s)",
    _forward,
    _forward_triton,
)
def _(w, raw, g):
    u, sigma, vh = torch.linalg.svd(w.to(compute_dtype(w, raw)), full_matrices=False)
    return w.new_empty(w.shape), u, sigma, vh, torch.empty_like(sigma)


@op(
    "singular_value_threshold_backward(Tensor grad, Tensor u, Tensor sigma, Tensor vh, Tensor s, Tensor raw, str g) -> "
    "(Tensor grad_w, Tensor grad_raw)",
    _backward,
    _backward,
)
def _(grad, u, sigma, vh, s, raw, g):
    return grad.new_empty(grad.shape), torch.empty_like(raw)


@function
class _SingularValueThreshold(torch.autograd.Function):
    """The result, and what its backward needs."""

    @staticmethod
    def forward(w, raw, g):
        return torch.ops.str_triton.singular_value_threshold(w, raw, g)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, raw, ctx.g = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, raw)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return None, None, None
        return *torch.ops.str_triton.singular_value_threshold_backward(grad, *ctx.saved_tensors, ctx.g), None


differentiable("singular_value_threshold", _SingularValueThreshold.apply)


def singular_value_threshold(w: Tensor, raw_threshold: Tensor, *, g: str = "exp") -> Tensor:
    """Compute U S(sigma) V^T: the singular values of w, soft-thresholded with a learnable raw threshold r.

    With w = U diag(sigma) V^T and s_i = S(sigma_i) = relu(sigma_i - g(r)), the rank of the result is the number of
    singular values above g(r). It is the X that minimizes  1/2 ||X - w||_F^2 + g(r) ||X||_nuclear. The gradients are
    exact and finite wherever no singular value equals g(r), also where singular values coincide or are zero, and do
    not depend on which singular vectors were found. With M = U^T grad V,

        dL/dw = U [ minus (M + M^T) / 2
                    + plus (M - M^T) / 2 ] V^T
                + (I - U U^T) grad V D V^T
                + U D U^T grad (I - V V^T)
        dL/dr = -g'(r) sum(M_ii where s_i > 0)

    Products inside the bracket are elementwise, and D = diag(s / sigma). minus_ij = (s_i - s_j)/(sigma_i - sigma_j) and
    plus_ij = (s_i + s_j)/(sigma_i + sigma_j), or their limits. All of them, and s / sigma, lie in [0, 1]. At a tie
    sigma_i = g(r) the singular value counts as pruned.

    A matrix that holds NaN or infinities has no singular values: its result and its dL/dw are NaN throughout, those of
    the other matrices of the batch are untouched. A raw threshold of NaN gives NaN too. Arithmetic is float64 if w or
    raw_threshold is, else float32, under autocast too. On a GPU float32 products run in TF32 if
    `torch.backends.cuda.matmul.fp32_precision` is "tf32".

    Args:
        w: [..., m, n], float16, bfloat16, float32 or float64; m < n, empty and non-contiguous tensors too.
        raw_threshold: r. One element of any shape; or shape w.shape[:-2] + (1, 1), one per matrix of the batch.
            Any of these dtypes, on w's device.
        g: "sigmoid", "exp", "softplus", or "identity" (the threshold itself; a negative value acts as 0).

    Returns:
        Tensor of w's shape and dtype, contiguous. Differentiable once, by autograd or `torch.func.grad`;
        `torch.func.vmap` loops over the batch.

    Raises:
        TypeError: w or raw_threshold is not a tensor of one of these dtypes.
        ValueError: unknown g, w of fewer than two dimensions, a raw_threshold of another shape or on another device.
        torch.linalg.LinAlgError: the singular value decomposition of a finite matrix did not converge.

    Source: Cai, Candes, Shen, SIAM J. Optim. 20(4), 2010 (arXiv 0810.3286), equation 2.2, with the learnable
    threshold of Kusupati et al., ICML 2020 (arXiv 2002.03231).
    """
    threshold_function(g)
    check_tensors({"w": w, "raw_threshold": raw_threshold})
    if w.dim() < 2:
        raise ValueError(f"w must be a matrix or a batch of matrices, got shape {tuple(w.shape)}")
    per_matrix = (*w.shape[:-2], 1, 1)
    if raw_threshold.numel() != 1 and raw_threshold.shape != per_matrix:
        raise ValueError(
            f"raw_threshold of shape {tuple(raw_threshold.shape)} does not fit w of shape {tuple(w.shape)}: "
            f"give one element, or shape {per_matrix} for one per matrix"
        )
    batch = math.prod(w.shape[:-2])
    raw = raw_threshold if raw_threshold.numel() == 1 else raw_threshold.reshape(batch, 1).contiguous()
    call = _SingularValueThreshold.forward if is_strict_export() else _SingularValueThreshold.apply
    out, *_ = call(w.reshape(batch, *w.shape[-2:]), raw, g)
    return out.reshape(w.shape)
