"""Recurrent layers that learn the rank of their matrices, with the arguments of torch's layers."""

from str_triton.nn.recurrent.fastgrnn import LowRankFastGRNN
from str_triton.nn.recurrent.layers import LowRankGRU, LowRankLSTM
from str_triton.nn.recurrent.low_rank_rnn import LowRankRNN

__all__ = ["LowRankFastGRNN", "LowRankGRU", "LowRankLSTM", "LowRankRNN"]
