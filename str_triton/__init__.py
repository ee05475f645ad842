"""Soft threshold reparameterization: networks that become sparse or low-rank while they train."""

from str_triton.nn import (
    STRConv1d,
    STRConv2d,
    STRConv3d,
    STREmbedding,
    STRLinear,
    densify,
    parameter_groups,
    sparsify,
)
from str_triton.ops.soft_threshold import soft_threshold, soft_threshold_many

__all__ = [
    "STRConv1d",
    "STRConv2d",
    "STRConv3d",
    "STREmbedding",
    "STRLinear",
    "densify",
    "parameter_groups",
    "soft_threshold",
    "soft_threshold_many",
    "sparsify",
]
