"""Soft threshold reparameterization: networks that become sparse or low-rank while they train."""

from str_triton.budget import (
    Budget,
    LayerBudget,
    MatrixBudget,
    RankBudget,
    RankController,
    RankTarget,
    SparsityController,
    Target,
    count,
    count_ranks,
)
from str_triton.nn import (
    LowRankFastGRNN,
    LowRankGRU,
    LowRankLayer,
    LowRankLinear,
    LowRankLSTM,
    LowRankRNN,
    LowRankWeight,
    STRConv1d,
    STRConv2d,
    STRConv3d,
    STREmbedding,
    STRLinear,
    densify,
    parameter_groups,
    plain_state_dict,
    refresh_batch_norm,
    sparsify,
)
from str_triton.ops.cells.fastgrnn import low_rank_fastgrnn
from str_triton.ops.cells.gru import low_rank_gru
from str_triton.ops.cells.lstm import low_rank_lstm
from str_triton.ops.cells.mgu import low_rank_mgu
from str_triton.ops.low_rank_gpu import shared_memory_limit
from str_triton.ops.low_rank_plan import Plan, low_rank_plan
from str_triton.ops.singular_value_threshold import singular_value_threshold
from str_triton.ops.soft_threshold import soft_threshold
from str_triton.ops.soft_threshold_many import soft_threshold_many

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "LayerBudget",
    "LowRankFastGRNN",
    "LowRankGRU",
    "LowRankLSTM",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankRNN",
    "LowRankWeight",
    "MatrixBudget",
    "Plan",
    "RankBudget",
    "RankController",
    "RankTarget",
    "STRConv1d",
    "STRConv2d",
    "STRConv3d",
    "STREmbedding",
    "STRLinear",
    "SparsityController",
    "Target",
    "count",
    "count_ranks",
    "densify",
    "low_rank_fastgrnn",
    "low_rank_gru",
    "low_rank_lstm",
    "low_rank_mgu",
    "low_rank_plan",
    "parameter_groups",
    "plain_state_dict",
    "refresh_batch_norm",
    "shared_memory_limit",
    "singular_value_threshold",
    "soft_threshold",
    "soft_threshold_many",
    "sparsify",
]
