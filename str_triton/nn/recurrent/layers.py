"""LowRankGRU and LowRankLSTM: torch's recurrent layers with a learned rank of each matrix."""

import torch
from torch import Tensor, nn

from str_triton.nn.recurrent.low_rank_rnn import LowRankRNN
from str_triton.ops.cells.gru import low_rank_gru
from str_triton.ops.cells.lstm import low_rank_lstm


class LowRankGRU(LowRankRNN):
    """nn.GRU with matrices in factors and a learned rank. Arguments, inputs, outputs and messages are those of nn.GRU.

        x  = W x_t + b_ih,  b = b_hh
        r  = sigmoid(x_r + R_r h + b_r)
        z  = sigmoid(x_z + R_z h + b_z)
        n  = tanh(x_n + r (R_n h + b_n))
        h' = (1 - z) n + z h

    W and R, over all gates, are products u diag(S(m)) v^T.

    A new layer at full rank computes the same function as a new nn.GRU with the same seed.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in nn.GRU.
        max_rank: maximum rank of each recurrent matrix; None: hidden_size.
        input_max_rank: maximum rank of each input matrix; None: the full rank.
        factorize: the matrices in factors, "both" kinds, the "recurrent" ones, or "none".
        ranks: makes a compact layer without thresholds: {"weight_hh_l0": 5, ...}; all other matrices are dense.
        g, gradient, raw_threshold_init: arguments of `LowRankWeight`.

    Attributes:
        weight_ih_l0: LowRankWeight [3 * hidden_size, ...], or Parameter; also weight_hh_l0, weight_ih_l0_reverse, ...
        bias_ih_l0: Parameter [3 * hidden_size]; also bias_hh_l0, ...

    Inputs and outputs are those of nn.GRU: input [T, B, input_size], [B, T, input_size] with batch_first,
    [T, input_size], or a PackedSequence; hx [num_layers * directions, B, hidden_size] or None. The layer returns output
    [T, B, directions * hidden_size], in the form of the input, and h in the shape of hx.

    Raises:
        ValueError, RuntimeError, TypeError: as nn.GRU, with the same messages; ranks out of range.
    """

    cell = "gru"
    gates = 3
    torch_class = nn.GRU
    has_dense = True

    def _loop(
        self, suffix: str, gates_x: Tensor, states: list[Tensor], lengths: Tensor | None, *, reverse: bool, native: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, m, v = self._recurrent_factors(suffix)
        bias = getattr(self, f"bias_hh_{suffix}", None)
        (h0,) = states
        outputs, h = low_rank_gru(gates_x, u, m, v, bias, h0, lengths, reverse=reverse, native=native)
        return outputs, (h,)

    def _cell(self, suffix: str, gates_x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = states
        gates_h = self._recur(suffix, h, getattr(self, f"bias_hh_{suffix}", None))
        (x_rz, x_n), (h_rz, h_n) = (x.tensor_split([2 * self.hidden_size], 1) for x in (gates_x, gates_h))
        r, z = torch.sigmoid(x_rz + h_rz).chunk(2, 1)
        n = torch.tanh(torch.addcmul(x_n, r, h_n))
        return (torch.lerp(n, h, z),)


class LowRankLSTM(LowRankRNN):
    """nn.LSTM with matrices in factors and a learned rank. Arguments, inputs, outputs and messages are nn.LSTM's.

        x  = W x_t + b_ih,  b = b_hh
        i  = sigmoid(x_i + R_i h + b_i)
        f  = sigmoid(x_f + R_f h + b_f)
        g  = tanh(x_g + R_g h + b_g)
        o  = sigmoid(x_o + R_o h + b_o)
        c' = f c + i g
        h' = o tanh(c')

    W and R, over all gates, are products u diag(S(m)) v^T.

    A new layer at full rank computes the same function as a new nn.LSTM with the same seed. Projections (proj_size) are
    not supported.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in nn.LSTM.
        max_rank, input_max_rank, factorize, ranks, g, gradient, raw_threshold_init: as in `LowRankGRU`.

    Attributes:
        weight_ih_l0: LowRankWeight [4 * hidden_size, ...], or Parameter; also weight_hh_l0, weight_ih_l0_reverse, ...
        bias_ih_l0: Parameter [4 * hidden_size]; also bias_hh_l0, ...

    Inputs and outputs are those of `LowRankGRU`, but hx is (h, c) or None, and the layer returns (h, c).

    Raises:
        ValueError, RuntimeError, TypeError: as nn.LSTM, with the same messages; ranks out of range.
    """

    cell = "lstm"
    gates = 4
    states = 2
    torch_class = nn.LSTM
    has_dense = True

    def _loop(
        self, suffix: str, gates_x: Tensor, states: list[Tensor], lengths: Tensor | None, *, reverse: bool, native: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, m, v = self._recurrent_factors(suffix)
        bias = getattr(self, f"bias_hh_{suffix}", None)
        h0, c0 = states
        return low_rank_lstm(gates_x, u, m, v, bias, h0, c0, lengths, reverse=reverse, native=native)

    def _cell(self, suffix: str, gates_x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        gates = gates_x + self._recur(suffix, h, getattr(self, f"bias_hh_{suffix}", None))
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
