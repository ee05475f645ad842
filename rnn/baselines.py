"""What learned ranks are compared with: ranks fixed from the start, and the SVD of a trained dense network."""

from collections.abc import Mapping

from torch import nn

from rnn.models import Architecture, copy_weights
from str_triton import LowRankWeight, RankController, RankTarget


def common_ranks(model: nn.Module, target: RankTarget) -> dict[str, int]:
    """The rank of each matrix of ``model.rnn`` where all have the same, or their full one where that is less.

    The rank is the largest that meets ``target``; ``model`` holds all matrices at full rank. Equal ranks beat equal
    shares of the full ranks by far where the inputs are few (docs/learned-rank.md).
    """
    factors = model.rnn.factors()
    dense = sum(factor.rows * factor.columns for factor in factors.values())
    others = _parameters_beside(model, factors)

    def meets(rank: int) -> bool:
        ranks = _at_rank(factors, rank)
        weights = sum(factors[name].compact_cost(own) for name, own in ranks.items())
        if target.total_rank is not None:
            return sum(ranks.values()) <= target.total_rank
        if target.params is not None:
            return others + weights <= target.params
        if target.recurrent_flops is not None:
            steps = (factors[name].compact_cost(own) for name, own in ranks.items() if factors[name].recurrent)
            return sum(steps) <= target.recurrent_flops
        return (others + dense) >= target.compression * (others + weights)

    # The first meets the target, as a controller has checked.
    return _at_rank(factors, max(filter(meets, range(1, max(f.max_rank for f in factors.values()) + 1))))


def svd_ranks(model: nn.Module, architecture: Architecture, target: RankTarget) -> dict[str, int]:
    """The ranks at which the SVD of dense ``model`` meets ``target``: one cut through all singular values together."""
    factored = architecture.build()
    copy_weights(model, factored)
    RankController(factored, target, schedule="constant", end=0.0).solve()
    return factored.rnn.ranks()


def _at_rank(factors: Mapping[str, LowRankWeight], rank: int) -> dict[str, int]:
    return {name: min(rank, factor.max_rank) for name, factor in factors.items()}


def _parameters_beside(model: nn.Module, factors: Mapping[str, LowRankWeight]) -> int:
    own = {id(parameter) for factor in factors.values() for parameter in factor.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
