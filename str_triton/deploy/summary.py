"""The summary of a packed file: its tensors and their sizes, as values and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from str_triton.budget.budget import Budget
from str_triton.budget.rank_budget import RankBudget
from str_triton.budget.table_files import aligned
from str_triton.files import percent

HEADINGS = ("tensor", "shape", "stored as", "elements", "nonzeros", "sparsity", "bytes")


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed file.

    Attributes:
        name: its name in the model's state dict; for a matrix in factors, the name of one factor.
        shape: the shape of the plain tensor.
        dtype: the dtype of the plain tensor, such as "float32".
        stored_dtype: the dtype of its values in the file.
        encoding: "dense", "bitmask", "gaps", or "shared" if another name holds the same tensor.
        nonzeros: the number of stored elements that are not zero.
        nbytes: its bytes in the file, without the header.
        sign_nbytes: the part of `nbytes` that holds the signs of zeros.
        dense_nbytes: its bytes as a plain tensor; 0 for a shared one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str
    encoding: str
    nonzeros: int
    nbytes: int
    sign_nbytes: int
    dense_nbytes: int

    @property
    def elements(self) -> int:
        """The number of elements of the plain tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PackedSummary:
    """A summary of a packed file. `str(summary)` is a table.

    Attributes:
        version: the version of the format.
        values: the dtype that weights were rounded to; "float32": no rounding.
        nbytes: the size of the file.
        tensors: the stored tensors, in the model's order.
        products: the names of the factors u and v, by the name of the matrix u v^T.
        budget: the model's budget; None if the file holds none.
        metadata: the metadata that were given to `pack`.
    """

    version: str
    values: str
    nbytes: int
    tensors: tuple[PackedTensor, ...]
    products: dict[str, tuple[str, str]]
    budget: Budget | RankBudget | None
    metadata: dict[str, Any]

    @property
    def dense_nbytes(self) -> int:
        """The bytes of the plain model's tensors. Matrices in factors are multiplied out, shared tensors count once."""
        stored = {tensor.name: tensor for tensor in self.tensors}
        pairs = [(stored.pop(u), stored.pop(v)) for u, v in self.products.values()]
        products = sum(u.dense_nbytes * v.shape[0] // u.shape[1] for u, v in pairs)
        return sum(tensor.dense_nbytes for tensor in stored.values()) + products

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each matrix that is stored in factors, by its name."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        return {name: shapes[u][1] for name, (u, _) in self.products.items()}

    @property
    def is_smaller(self) -> bool:
        """True if zeros or factors made a tensor smaller. Otherwise all tensors are stored dense."""
        return bool(self.products) or any(tensor.encoding in ("bitmask", "gaps") for tensor in self.tensors)

    def __str__(self) -> str:
        return "\n".join([aligned(self.lines()), "", *self.remarks()])

    def lines(self) -> list[tuple[str, ...]]:
        """Return the table's cells: a heading, a line per tensor of two or more dimensions, the others, a total."""
        large = [tensor for tensor in self.tensors if len(tensor.shape) > 1]
        small = [tensor for tensor in self.tensors if len(tensor.shape) <= 1]
        body = [_cells(tensor.name, "x".join(map(str, tensor.shape)), [tensor]) for tensor in large]
        if small:
            body.append(_cells("(vectors and scalars)", "", small))
        once = [tensor for tensor in self.tensors if tensor.encoding != "shared"]
        return [HEADINGS, *body, _cells("total", "", once)]

    def remarks(self) -> list[str]:
        """Return sentences about the file: its size and the plain model's, its ranks, and what could be smaller."""
        share = f", {100 * self.nbytes / self.dense_nbytes:.1f} %" if self.dense_nbytes else ""
        rounded = "" if self.values == "float32" else f"; weights are rounded to {self.values}"
        found = [f"{size(self.nbytes)} instead of {size(self.dense_nbytes)}{share}{rounded}."]
        if self.products:
            matrices = "1 matrix is" if len(self.products) == 1 else f"{len(self.products)} matrices are"
            found.append(f"{matrices} stored in factors, of rank {sum(self.ranks.values())} in all.")
        if not self.is_smaller:
            found.append("No tensor holds enough zeros to be stored without them: all are stored dense.")
        if signs := sum(tensor.sign_nbytes for tensor in self.tensors):
            found.append(f"{size(signs)} are signs of negative zeros (-0.0), which plain_zeros drops.")
        return found


def size(nbytes: int) -> str:
    """Return a number of bytes with its unit: 12.03 MB, 4.1 kB."""
    if nbytes >= 1e6:
        return f"{nbytes / 1e6:.2f} MB"
    return f"{nbytes / 1e3:.1f} kB" if nbytes >= 1e3 else f"{nbytes} bytes"


def _cells(name: str, shape: str, tensors: Sequence[PackedTensor]) -> tuple[str, ...]:
    """Return a line of the table with the sums over the tensors."""
    kinds = {tensor.encoding for tensor in tensors}
    elements, nonzeros = (sum(getattr(tensor, name) for tensor in tensors) for name in ("elements", "nonzeros"))
    return (
        name,
        shape,
        kinds.pop() if len(kinds) == 1 else "",
        f"{elements:,}",
        f"{nonzeros:,}",
        percent(1 - nonzeros / elements) if elements else "",
        f"{sum(tensor.nbytes for tensor in tensors):,}",
    )
