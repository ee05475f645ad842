"""Recurrent networks that learn their rank: models, data, recipes and the training program."""

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM

__all__ = ["LowRankFastGRNN", "LowRankGRU", "LowRankLSTM"]
