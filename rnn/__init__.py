"""Recurrent networks that learn their rank: models, data, recipes and the training program."""

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM
from str_triton.programs import check_started_program

__all__ = ["LowRankFastGRNN", "LowRankGRU", "LowRankLSTM"]

check_started_program()
