"""Layers built on the ops, and model surgery."""

from str_triton.nn.layers import STRConv1d, STRConv2d, STRConv3d, STREmbedding, STRLayer, STRLinear
from str_triton.nn.low_rank import LowRankWeight
from str_triton.nn.low_rank_linear import LowRankLayer, LowRankLinear
from str_triton.nn.parameter_groups import parameter_groups
from str_triton.nn.surgery import densify, sparsify, str_layers

__all__ = [
    "LowRankLayer",
    "LowRankLinear",
    "LowRankWeight",
    "STRConv1d",
    "STRConv2d",
    "STRConv3d",
    "STREmbedding",
    "STRLayer",
    "STRLinear",
    "densify",
    "parameter_groups",
    "sparsify",
    "str_layers",
]
