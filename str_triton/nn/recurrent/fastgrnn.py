"""LowRankFastGRNN: a gated recurrent layer of two small matrices with learned ranks."""

from collections.abc import Mapping
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from str_triton.nn.recurrent.low_rank_rnn import LowRankRNN
from str_triton.nn.recurrent.matrices import ConversionOptions
from str_triton.ops.cells.fastgrnn import low_rank_fastgrnn


class RankOptions(ConversionOptions, total=False):
    """The keyword-only arguments of the layers, without device and dtype."""

    max_rank: int | None


class LowRankFastGRNN(LowRankRNN):
    """FastGRNN, a cell whose gate and candidate share the matrices W and R. The interface is that of nn.GRU.

        a  = W x_t + R h
        z  = sigmoid(a + b_gate)
        c  = tanh(a + b_update)
        k  = sigmoid(zeta) (1 - z) + sigmoid(nu)
        h' = k c + z h

    W and R are products u diag(S(m)) v^T. The initial values are 0.1 randn for W and R, 1 for the biases and zeta, and
    -4 for nu. torch has no kernel for this cell, so a dense recurrent matrix (factorize="none", or after `compact`)
    runs through the same op, with the identity as its second factor.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in nn.GRU.
        max_rank, input_max_rank, factorize, ranks, g, gradient, raw_threshold_init: as in `LowRankGRU`.

    Attributes:
        weight_ih_l0: LowRankWeight or Parameter [hidden_size, input_size].
        weight_hh_l0: LowRankWeight or Parameter [hidden_size, hidden_size].
        bias_gate_l0: Parameter [hidden_size]; also bias_update_l0, ...
        zeta_l0: Parameter [1]; also nu_l0, ...

    Inputs, outputs and errors are those of `LowRankGRU`.

    Sources: Kusupati et al., NeurIPS 2018 (arXiv 1901.02358); for the low rank Kusupati et al., ICML 2020, section 3.3.
    """

    cell = "fastgrnn"
    gates = 1
    biases = ("bias_gate", "bias_update")
    scalars = ("zeta", "nu")
    torch_class = nn.RNN

    def _initial(self, name: str, value: Tensor) -> Tensor:
        if name.startswith("weight"):
            return value.normal_(std=0.1)
        return value.fill_(-4 if name.startswith("nu") else 1)

    def _loop(
        self, suffix: str, gates_x: Tensor, states: list[Tensor], lengths: Tensor | None, *, reverse: bool, native: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        bias_gate, bias_update = (getattr(self, f"{name}_{suffix}", None) for name in self.biases)
        zeta, nu = (getattr(self, f"{name}_{suffix}") for name in self.scalars)
        u, m, v = self._recurrent_factors(suffix)
        (h0,) = states
        outputs, h = low_rank_fastgrnn(
            gates_x, u, m, v, bias_gate, bias_update, zeta, nu, h0, lengths, reverse=reverse, native=native
        )
        return outputs, (h,)

    def _cell(self, suffix: str, gates_x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = states
        a = gates_x + self._recur(suffix, h)
        z, c = a, a
        if self.bias:
            z, c = a + getattr(self, f"bias_gate_{suffix}"), a + getattr(self, f"bias_update_{suffix}")
        z, c = z.sigmoid(), c.tanh()
        zeta, nu = (getattr(self, f"{name}_{suffix}").sigmoid() for name in self.scalars)
        return ((zeta * (1 - z) + nu) * c + z * h,)

    @classmethod
    def from_edgeml(
        cls, parameters: Mapping[str, Any], *, layout: str = "cell", **options: Unpack[RankOptions]
    ) -> Self:
        """Make one layer that computes the same function as an EdgeML cell, by default with the cell's ranks.

        Args:
            parameters: the state dict of the cell, tensors or arrays, for I inputs and H hidden units. A FastGRNNCell
                (layout="cell", row vectors) has W [I, H], or W1 [I, r] and W2 [r, H]; U [H, H], or U1 [H, r] and
                U2 [r, H]; bias_gate and bias_update [1, H]; zeta and nu [1, 1].
            layout: "cuda" for a FastGRNNCUDACell, which holds transposed matrices: W [H, I], or W1 [r, I] and W2
                [H, r]; U [H, H], or U1 [r, H] and U2 [H, r].
            options: keyword-only arguments of the class; max_rank and input_max_rank default to the cell's ranks.

        Raises:
            ValueError: a missing or unknown key, a shape that does not fit (the message names the key), or an unknown
                layout.
        """
        if layout not in ("cell", "cuda"):
            raise ValueError(f"layout must be 'cell' or 'cuda', got {layout!r}")
        values = {key: torch.as_tensor(value).detach() for key, value in parameters.items()}
        w, input_rank = _matrix(values, "W", None, transposed=layout == "cuda")
        hidden, inputs = w.shape
        u, rank = _matrix(values, "U", hidden, transposed=layout == "cuda")
        options.setdefault("max_rank", rank)
        options.setdefault("input_max_rank", input_rank)
        layer = cls(inputs, hidden, device="meta", dtype=w.dtype, **options).to_empty(device=w.device)
        layer._set("weight_ih_l0", w)
        layer._set("weight_hh_l0", u)
        for key, size in {"bias_gate": hidden, "bias_update": hidden, "zeta": 1, "nu": 1}.items():
            value = _take(values, key)
            if value.numel() != size:
                raise ValueError(f"{key} must have shape [1, {size}], got {list(value.shape)}")
            layer._set(f"{key}_l0", value.flatten())
        if values:
            raise ValueError(f"unknown parameters of a FastGRNN cell: {', '.join(values)}")
        return layer


def _take(values: dict[str, Tensor], key: str) -> Tensor:
    if key not in values:
        raise ValueError(f"parameter {key} is missing; there are {', '.join(values)}")
    return values.pop(key)


def _column_matrix(
    values: dict[str, Tensor], key: str, rows: int | None, columns: int | None, *, transposed: bool
) -> Tensor:
    """Return a matrix for column vectors and check its shape; None allows any size.

    The stored matrix is one for row vectors unless it is `transposed`.
    """
    value = _take(values, key)
    if value.dim() != 2:
        raise ValueError(f"{key} must have 2 dimensions, got shape {list(value.shape)}")
    matrix = value if transposed else value.mT
    shape = [size if size is not None else own for size, own in zip((rows, columns), matrix.shape, strict=True)]
    if list(matrix.shape) != shape:
        raise ValueError(f"{key} must have shape {shape if transposed else shape[::-1]}, got {list(value.shape)}")
    return matrix


def _matrix(values: dict[str, Tensor], key: str, size: int | None, *, transposed: bool) -> tuple[Tensor, int | None]:
    """Return the matrix [H, I] of `key` and its rank, which is None where the cell stores one dense matrix.

    size: the value of both H and I, or None where they are not known.
    """
    if f"{key}1" not in values:
        return _column_matrix(values, key, size, size, transposed=transposed), None
    first = _column_matrix(values, f"{key}1", None, size, transposed=transposed)
    second = _column_matrix(values, f"{key}2", size, len(first), transposed=transposed)
    product = second @ first
    return product, min(len(first), *product.shape)
