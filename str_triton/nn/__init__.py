"""Layers built on the ops, and model surgery."""

from str_triton.nn.batch_norm import refresh_batch_norm
from str_triton.nn.control import Control, warn_if_unfinished
from str_triton.nn.holder import ThresholdHolder
from str_triton.nn.layers import STRConv1d, STRConv2d, STRConv3d, STREmbedding, STRLayer, STRLinear
from str_triton.nn.low_rank import LowRankWeight
from str_triton.nn.low_rank_linear import LowRankLayer, LowRankLinear
from str_triton.nn.matrices import Matrix, matrices
from str_triton.nn.parameter_groups import parameter_groups
from str_triton.nn.plain import plain_state_dict
from str_triton.nn.recurrent import LowRankFastGRNN, LowRankGRU, LowRankLSTM, LowRankRNN
from str_triton.nn.surgery import densify, sparsify, str_layers
from str_triton.nn.thresholded import (
    ThresholdedWeight,
    require_one_threshold,
    require_own_weights,
    thresholded_weights,
    weight_name,
)

__all__ = [
    "Control",
    "LowRankFastGRNN",
    "LowRankGRU",
    "LowRankLSTM",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankRNN",
    "LowRankWeight",
    "Matrix",
    "STRConv1d",
    "STRConv2d",
    "STRConv3d",
    "STREmbedding",
    "STRLayer",
    "STRLinear",
    "ThresholdHolder",
    "ThresholdedWeight",
    "densify",
    "matrices",
    "parameter_groups",
    "plain_state_dict",
    "refresh_batch_norm",
    "require_one_threshold",
    "require_own_weights",
    "sparsify",
    "str_layers",
    "thresholded_weights",
    "warn_if_unfinished",
    "weight_name",
]
