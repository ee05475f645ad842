"""Soft threshold reparameterization: networks that become sparse or low-rank while they train."""

from str_triton.ops.soft_threshold import soft_threshold, soft_threshold_many

__all__ = ["soft_threshold", "soft_threshold_many"]
