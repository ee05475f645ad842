"""What learned ranks are compared with: ranks fixed from the start, and the SVD of a trained dense network."""

from collections.abc import Mapping

from torch import nn

from rnn.models import Architecture, copy_weights
from str_triton import LowRankWeight, RankController, RankTarget


def common_ranks(model: nn.Module, target: RankTarget) -> dict[str, int]:
    """The rank of each matrix of ``model.rnn`` where all have the same share of their full rank.

    The share is the largest that meets ``target``; a matrix has one component at least. ``model`` holds all matrices at
    full rank.
    """
    factors = model.rnn.factors()
    shares = sorted({rank / factor.max_rank for factor in factors.values() for rank in range(1, factor.max_rank + 1)})
    dense = sum(factor.rows * factor.columns for factor in factors.values())
    others = _parameters_beside(model, factors)

    def meets(share: float) -> bool:
        ranks = _at_share(factors, share)
        weights = sum(factors[name].compact_cost(rank) for name, rank in ranks.items())
        if target.total_rank is not None:
            return sum(ranks.values()) <= target.total_rank
        if target.params is not None:
            return others + weights <= target.params
        if target.recurrent_flops is not None:
            steps = (factors[name].compact_cost(rank) for name, rank in ranks.items() if factors[name].recurrent)
            return sum(steps) <= target.recurrent_flops
        return (others + dense) >= target.compression * (others + weights)

    low, high = 0, len(shares)  # the first meets the target, as a controller has checked
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(shares[middle]) else (low, middle)
    return _at_share(factors, shares[low])


def svd_ranks(model: nn.Module, architecture: Architecture, target: RankTarget) -> dict[str, int]:
    """The ranks at which the SVD of dense ``model`` meets ``target``: one cut through all singular values together."""
    factored = architecture.build()
    copy_weights(model, factored)
    RankController(factored, target, schedule="constant", end=0.0).solve()
    return factored.rnn.ranks()


def _at_share(factors: Mapping[str, LowRankWeight], share: float) -> dict[str, int]:
    # The share of a whole rank may lie a rounding below it.
    return {name: max(1, int(share * factor.max_rank + 1e-9)) for name, factor in factors.items()}


def _parameters_beside(model: nn.Module, factors: Mapping[str, LowRankWeight]) -> int:
    own = {id(parameter) for factor in factors.values() for parameter in factor.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
