"""A matrix in factors, whose rank is learned: u diag(S(m)) v^T.

Source: Kusupati et al., ICML 2020, section 3.3 (W = (W1 * m) W2 with a soft threshold on m). Here the threshold acts on
|m_k| ||u_k|| ||v_k||, the size of a component, however it is divided among the factors (docs/derivations.md).
"""

from typing import Self, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton.nn.holder import ThresholdHolder
from str_triton.nn.raw_threshold import new_raw_threshold
from str_triton.nn.shards import full, is_sharded, store
from str_triton.ops.soft_threshold import soft_threshold

COLUMNS = 16  # A product of 100 rows and 80 columns takes 8 us with 16 columns, 12 us with 8 and 30 us with 9.
RAW_THRESHOLD = -10.0  # the paper's bound for g = exp: a threshold of 4.5e-5


class FactorOptions(TypedDict, total=False):
    """The options of `LowRankWeight` by keyword, without device and dtype."""

    g: str
    gradient: str
    raw_threshold_init: float
    recurrent: bool
    thresholded: bool


class LowRankWeight(ThresholdHolder):
    """A matrix [rows, columns] as the sum of max_rank components; a learned threshold removes the small ones.

        W    = sum_k s_k u_k v_k^T
        s_k  = S(m_k n_k) / n_k
        n_k  = ||u_k|| ||v_k||
        S(x) = sign(x) relu(|x| - g(raw))

    A component is cut when its size |m_k| n_k is at most the threshold. The sizes do not depend on how they are divided
    among m_k, u_k and v_k. If the columns of u and those of v are orthogonal, they are the singular values.

    Args:
        rows, columns: of the matrix.
        max_rank: number of components; None: min(rows, columns).
        g, gradient: the options of `soft_threshold`.
        raw_threshold_init: where the raw threshold starts.
        recurrent: the matrix is applied once per time step, and counts towards a target in recurrent FLOPs.
        thresholded: False: components alone, without m and a threshold, as `compact` leaves them.

    Attributes:
        u: Parameter [rows, max_rank].
        v: Parameter [columns, max_rank].
        m: Parameter [max_rank], or None.
        raw_threshold: Parameter [1], float32 (float64 if u is), or None.

    A new one holds the singular value decomposition of a matrix drawn as in nn.Linear.

    Raises:
        ValueError: a max_rank below 1 or above min(rows, columns), or unknown options.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        max_rank: int | None = None,
        *,
        g: str = "exp",
        gradient: str = "masked",
        raw_threshold_init: float = RAW_THRESHOLD,
        recurrent: bool = False,
        thresholded: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        largest = min(rows, columns)
        max_rank = largest if max_rank is None else max_rank
        if not 1 <= max_rank <= largest:
            raise ValueError(f"max_rank must be from 1 to {largest} for a {rows} x {columns} matrix, got {max_rank}")
        self.rows, self.columns, self.max_rank = rows, columns, max_rank
        self.recurrent = recurrent
        self.u = nn.Parameter(torch.empty(rows, max_rank, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(columns, max_rank, device=device, dtype=dtype))
        m, raw = None, None
        if thresholded:
            m = nn.Parameter(torch.empty(max_rank, device=device, dtype=dtype))
            raw = new_raw_threshold(self.u, g=g, raw_threshold_init=raw_threshold_init)
            # Every check of the forward, without its arithmetic.
            soft_threshold(m.to("meta"), raw.to("meta"), g=g, gradient=gradient)
        self.m = m
        self._hold(raw, g, gradient, raw_threshold_init)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Set the first threshold and the components of a matrix; None: of a matrix drawn as in nn.Linear."""
        self.reset_threshold()
        if weight is None:
            bound = self.columns**-0.5
            weight = torch.empty(self.rows, self.columns, dtype=self.u.dtype, device=self.u.device)
            weight.uniform_(-bound, bound)
        self.set_weight(weight)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Hold the max_rank largest singular components of a matrix [rows, columns], in place.

        m_k becomes sigma_k + g(raw), so that the thresholded spectrum is the singular values, whatever the threshold.
        """
        if weight.shape != (self.rows, self.columns):
            raise ValueError(f"weight must have shape ({self.rows}, {self.columns}), got {tuple(weight.shape)}")
        u, sigma, vh = torch.linalg.svd(
            weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
        )
        k = self.max_rank
        store(self.v, vh[:k].mT)
        if self.m is None:
            store(self.u, u[:, :k] * sigma[:k])
        else:
            store(self.u, u[:, :k])
            store(self.m, sigma[:k] + self.threshold.to(sigma.dtype))

    @classmethod
    def from_dense(cls, weight: Tensor, max_rank: int | None = None, **options: Unpack[FactorOptions]) -> Self:
        """Return the max_rank largest singular components of a matrix [rows, columns]; `options`: of the class."""
        rows, columns = weight.shape
        layer = cls(rows, columns, max_rank, device="meta", dtype=weight.dtype, **options)
        layer.to_empty(device=weight.device).reset_parameters(weight.detach())
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.rows, self.columns

    @property
    def threshold(self) -> Tensor:
        """g(raw_threshold), in units of the singular values; [1], and 0 without a threshold."""
        if self.raw_threshold is None:
            return self.u.new_zeros(1)
        return full(super().threshold)

    def spectrum(self) -> Tensor:
        """Return s [max_rank], what stands between u and v; differentiable, of u's dtype."""
        if self.m is None:
            return self.u.new_ones(self.max_rank)
        sizes, norms = self._thresholded(self.m)
        return (sizes / norms).to(self.u.dtype)

    def surviving(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return u [rows, r], the spectrum [r] and v [columns, r] for products with the matrix; differentiable.

        Eager code on the CPU with the masked gradient gets the components that the threshold leaves, filled up with
        others to a multiple of `COLUMNS`: a component that is cut adds nothing to a product, and its gradients are
        zeros. In every other case r is max_rank: the number of survivors would make Python wait for a GPU, or would
        become a part of a compiled graph; the straight-through gradient needs what is cut.
        """
        if self.m is None:
            return self.u, self.spectrum(), self.v
        sizes, norms = self._thresholded(self.m)
        spectrum = (sizes / norms).to(self.u.dtype)
        if self.gradient != "masked" or not self._reads_values(sizes):
            return self.u, spectrum, self.v
        is_cut = sizes.detach() == 0
        rank = self.max_rank - int(is_cut.count_nonzero())
        count = max(-(-rank // COLUMNS), 1) * COLUMNS
        if count >= self.max_rank:
            return self.u, spectrum, self.v
        chosen = is_cut.to(torch.uint8).argsort(stable=True)[:count]
        return self.u.index_select(1, chosen), spectrum.index_select(0, chosen), self.v.index_select(1, chosen)

    def _thresholded(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Return S(m_k n_k) and n_k [max_rank], in the dtype of the arithmetic."""
        norms = self._norms()
        if self.gradient == "straight_through":
            norms = norms.detach()  # Else three factors would move the size of what is cut (docs/derivations.md).
        return self.apply_threshold(full(m).to(norms.dtype) * norms), norms

    def _reads_values(self, sizes: Tensor) -> bool:
        """Return whether Python may read `sizes` for free: real numbers, on the CPU, outside of any graph."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return False
        if sizes.device.type != "cpu" or type(sizes) is not Tensor or is_sharded(self.u):  # a FakeTensor is a subclass
            return False
        return not torch._C._functorch.is_functorch_wrapped_tensor(sizes)  # a tensor inside vmap has no value

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """Return the sizes |m_k| ||u_k|| ||v_k|| [max_rank] before the threshold, in the order of the components.

        float32 (float64 if u is), as `spectrum` compares them with the threshold.
        """
        norms = self._norms()
        return norms if self.m is None else full(self.m).to(norms.dtype).abs() * norms

    def _norms(self) -> Tensor:
        dtype = torch.promote_types(self.u.dtype, torch.float32)
        tiny = torch.finfo(dtype).tiny
        # Not vector_norm, which walks down the columns: ten times slower on the CPU at 1536 x 512.
        u, v = (full(factor).to(dtype).square().sum(0).clamp_min(tiny).sqrt() for factor in (self.u, self.v))
        # A component without a direction has no size, whatever its norm; the division by it must stay finite.
        return (u * v).clamp_min(tiny**0.5)

    def weight(self) -> Tensor:
        """Return the matrix [rows, columns]; differentiable."""
        return (full(self.u) * self.spectrum()) @ full(self.v).mT

    @property
    def rank(self) -> int:
        """Number of components that the threshold leaves."""
        return int(self.spectrum().detach().count_nonzero())

    def compact_cost(self, rank: int) -> int:
        """Return the weights, or multiply-adds per vector, of the compact form at this rank; at most the dense ones."""
        return min(rank * (self.rows + self.columns), self.rows * self.columns)

    def pruning_offsets(self) -> Tensor:
        """Return for each component g^-1(size) - raw_threshold, the least rise of raw_threshold that cuts it.

        Detached, [max_rank]; -inf for a size of 0, inf for one that no threshold of g reaches.
        """
        return self.offsets_from(self.singular_values(), full(self.raw()))

    @torch.no_grad()
    def refactor(self) -> None:
        """Replace the surviving components by their singular value decomposition, in place.

        The matrix stays the same up to rounding. The sizes of the survivors become its singular values plus the
        threshold, half of each in u and half in v, and their m becomes 1: with the whole size in m, an optimizer would
        let large components run away. The largest component takes the place of the largest, and so on, with the sign
        that turns it least: an optimizer's moments still belong to it. Cut components stay as they are. Reads the rank,
        which synchronizes with the GPU.
        """
        spectrum = self.spectrum()
        left = spectrum.nonzero().flatten()
        left = left[self.singular_values()[left].argsort(descending=True, stable=True)]
        dtype = torch.promote_types(self.u.dtype, torch.float32)
        (qu, ru), (qv, rv) = (
            torch.linalg.qr(factor.to(dtype))
            for factor in (full(self.u)[:, left] * spectrum[left], full(self.v)[:, left])
        )
        p, sigma, qh = torch.linalg.svd(ru @ rv.mT)
        signs = torch.where((p * ru).sum(0) < 0, -1, 1)  # -1: the new column of u looks away from the old one
        root = (sigma + self.threshold.to(dtype)).sqrt() * signs
        for parameter, value in (
            (self.u, qu @ p * root),
            (self.v, qv @ qh.mT * root),
            (self.trained_spectrum(), torch.ones_like(sigma)),
        ):
            whole = full(parameter)
            store(parameter, whole.index_copy_(whole.dim() - 1, left, value.to(whole.dtype)))

    def trained_spectrum(self) -> nn.Parameter:
        """Return m. Raises ValueError in a matrix without a threshold."""
        if self.m is None:
            raise ValueError("this matrix has no threshold, and so no spectrum of its own")
        return self.m

    @torch.no_grad()
    def settle(self, raw_threshold: Tensor) -> None:
        """Lower the threshold to g(raw_threshold), in place, and change m so that the matrix stays the same.

        Components that are cut get m = 0, so that they stay cut.
        """
        spectrum = self.spectrum()
        store(self.raw(), raw_threshold)
        store(self.trained_spectrum(), spectrum + spectrum.sign() * self.threshold / self._norms())

    @torch.no_grad()
    def compact(self) -> "LowRankWeight | None":
        """Return only the components that the threshold leaves, largest first, with the spectrum in u.

        None where the factors would be no smaller than the dense matrix: rank (rows + columns) >= rows columns. A
        matrix whose components are all cut keeps one of zeros.
        """
        spectrum = self.spectrum()
        left = spectrum.count_nonzero().clamp_min(1)
        if left * (self.rows + self.columns) >= self.rows * self.columns:
            return None
        # Cut components come last.
        order = torch.where(spectrum != 0, self.singular_values(), -1).argsort(descending=True)[:left]
        compact = LowRankWeight(
            *self.shape, len(order), recurrent=self.recurrent, thresholded=False, device="meta", dtype=self.u.dtype
        )
        compact.u = nn.Parameter(full(self.u)[:, order] * spectrum[order])
        compact.v = nn.Parameter(full(self.v)[:, order].clone())
        return compact.train(self.training)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return W x + bias [rows] over the last dimension: [..., columns] -> [..., rows]."""
        u, spectrum, v = self.surviving()
        return F.linear(F.linear(x, v.mT), u * spectrum, bias)

    def extra_repr(self) -> str:
        text = f"{self.rows}, {self.columns}, max_rank={self.max_rank}"
        if self.m is None or self.u.is_meta or is_sharded(self.u):
            return text
        return f"{text}, rank={self.rank}, threshold={self.threshold.item():.4g}, g={self.g}, gradient={self.gradient}"
