"""Recurrent networks that learn their rank."""

from rnn.layers import LowRankGRU

__all__ = ["LowRankGRU"]
