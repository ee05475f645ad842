"""Baselines for learned ranks: ranks fixed from the start, and the SVD of a trained dense network."""

from dataclasses import replace

from torch import nn

from str_triton import RankController, RankTarget, count_ranks
from str_triton.rnn.models import Architecture, LanguageModel, SequenceClassifier, copy_weights
from str_triton.rnn.recipes import read_ranks


def equal_ranks(model: SequenceClassifier | LanguageModel, target: RankTarget) -> dict[str, int]:
    """Return a rank for each matrix of ``model.rnn``: one common rank, or the full rank where that is smaller.

    The common rank is the largest that meets ``target``. ``model`` holds all matrices at full rank. For small inputs,
    equal ranks are far better than equal shares of the full ranks (docs/learned-rank.md).
    """
    factors, budget = model.rnn.factors(), count_ranks(model)
    ((name, value),) = ((name, value) for name, value in vars(target).items() if value is not None)

    def meets(rank: int) -> bool:
        at_rank = replace(budget, rows=[replace(row, rank=min(rank, row.max_rank)) for row in budget.rows])
        cost = getattr(at_rank, name)
        return cost >= value if name == "compression" else cost <= value

    # Rank 1 meets the target: a controller has checked it.
    common = max(filter(meets, range(1, max(factor.max_rank for factor in factors.values()) + 1)))
    return {name: min(common, factor.max_rank) for name, factor in factors.items()}


def given_ranks(model: SequenceClassifier | LanguageModel, text: str) -> dict[str, int]:
    """Return the rank of each matrix of ``model.rnn`` from --ranks, "INPUT,RECURRENT".

    ``model`` holds all matrices at full rank. Raises ``ValueError`` for a rank above a matrix's full rank.
    """
    pair = read_ranks(text)
    chosen = {name: pair[factor.recurrent] for name, factor in model.rnn.factors().items()}
    for name, factor in model.rnn.factors().items():
        if chosen[name] > factor.max_rank:
            raise ValueError(f"--ranks {text}: the rank of {name} is at most {factor.max_rank}, not {chosen[name]}")
    return chosen


def svd_ranks(model: nn.Module, architecture: Architecture, target: RankTarget) -> dict[str, int]:
    """Return the ranks at which the SVD of a dense ``model`` meets ``target``, with one threshold for all matrices."""
    factored = architecture.build()
    copy_weights(model, factored)
    RankController(factored, target, schedule="constant", end=0.0, distribution="fixed").solve()
    return factored.rnn.ranks()
