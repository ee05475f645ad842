"""The range that the 256 codes of a value span: observed on batches, then cut by percentile or by squared error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from str_triton.deploy.sparse.graph.quantized import TOP, Grid

BINS = 2048
METHODS = ("mse", "percentile", "minmax")
TAIL = 5e-5  # the share of the numbers that "percentile" cuts at each end
CUTS = [1 - i / 50 for i in range(40)]  # the fractions of either end of the range that "mse" tries


@dataclass
class Range:
    """The numbers that a value takes: the least and the greatest, then how many fall into each of BINS bins."""

    low: float = 0.0
    high: float = 0.0
    counts: Tensor | None = None

    def widen(self, x: Tensor) -> None:
        """Extend the range to the numbers of `x` that are finite."""
        x = x[x.isfinite()]
        if x.numel():
            self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))

    def count(self, x: Tensor) -> None:
        """Count the numbers of `x`, once the range is known."""
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64)
        if self.high > self.low:
            self.counts += torch.histc(x.detach().float(), BINS, self.low, self.high).double()

    def centers(self) -> Tensor:
        edges = torch.linspace(self.low, self.high, BINS + 1, dtype=torch.float64)
        return (edges[1:] + edges[:-1]) / 2

    def grid(self, method: str) -> Grid:
        """Return the grid for these numbers by one of METHODS."""
        if method == "minmax" or self.counts is None or not float(self.counts.sum()):
            return Grid.over(self.low, self.high)
        if method == "percentile":
            shares = self.counts.cumsum(0) / self.counts.sum()
            inside = self.centers()[(shares >= TAIL) & (shares <= 1 - TAIL)]
            return Grid.over(float(inside[0]), float(inside[-1])) if len(inside) else Grid.over(self.low, self.high)
        high = min((cut * self.high for cut in CUTS), key=lambda high: self._error(Grid.over(self.low, high)))
        return min((Grid.over(cut * self.low, high) for cut in CUTS), key=self._error)

    def _error(self, grid: Grid) -> float:
        """Return the sum of squared errors that the numbers have on a grid."""
        centers = self.centers()
        steps = torch.round(centers / grid.scale).clamp(-grid.zero, TOP - grid.zero)
        return float(((steps * grid.scale - centers) ** 2 * self.counts).sum())
