"""Recurrent networks that learn their rank."""

from rnn.fastgrnn import LowRankFastGRNN
from rnn.layers import LowRankGRU, LowRankLSTM

__all__ = ["LowRankFastGRNN", "LowRankGRU", "LowRankLSTM"]
