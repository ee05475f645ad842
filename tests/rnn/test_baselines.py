import pytest
import torch

from str_triton import RankTarget, count_ranks
from str_triton.rnn.baselines import equal_ranks, given_ranks, svd_ranks
from str_triton.rnn.models import Architecture

ARCHITECTURE = Architecture(
    task="classify", cell="gru", inputs=4, outputs=3, hidden_size=12, layers=2, bidirectional=True
)


@pytest.mark.parametrize(
    ("target", "figure"),
    [
        (RankTarget(total_rank=20), "total_rank"),
        (RankTarget(params=2500), "params"),
        (RankTarget(recurrent_flops=700), "recurrent_flops"),
        (RankTarget(compression=2.0), "compression"),
    ],
)
def test_equal_ranks_are_the_largest_that_meet_the_target(target: RankTarget, figure: str):
    ranks = equal_ranks(ARCHITECTURE.build(), target)
    full = {name: factor.max_rank for name, factor in ARCHITECTURE.build().rnn.factors().items()}
    assert ranks.keys() == full.keys()
    common = max(ranks.values())
    assert ranks == {name: min(common, whole) for name, whole in full.items()}

    def cost(ranks: dict[str, int]) -> float:
        budget = count_ranks(ARCHITECTURE.build(ranks=ranks))
        return 1 / budget.compression if figure == "compression" else getattr(budget, figure)

    wanted = 1 / target.compression if figure == "compression" else getattr(target, figure)
    assert cost(ranks) <= wanted
    assert cost({name: min(common + 1, whole) for name, whole in full.items()}) > wanted


def test_the_common_rank_may_be_the_whole_one():
    ranks = equal_ranks(ARCHITECTURE.build(), RankTarget(compression=1.0))
    assert ranks == {name: factor.max_rank for name, factor in ARCHITECTURE.build().rnn.factors().items()}


def test_svd_ranks_cut_at_one_singular_value_of_all_matrices():
    torch.manual_seed(3)
    dense = ARCHITECTURE.build(factorize="none")
    ranks = svd_ranks(dense, ARCHITECTURE, RankTarget(total_rank=30))
    assert sum(ranks.values()) == 30
    sigmas = {name: torch.linalg.svdvals(getattr(dense.rnn, name).detach()) for name in ranks}
    kept = min(sigmas[name][rank - 1] for name, rank in ranks.items())
    cut = max(sigmas[name][rank] for name, rank in ranks.items() if rank < len(sigmas[name]))
    assert kept > cut


def test_given_ranks_are_those_of_the_input_and_of_the_recurrent_matrices():
    ranks = given_ranks(ARCHITECTURE.build(), "4,7")
    assert len(ranks) == 8
    assert all(rank == (7 if name.startswith("weight_hh") else 4) for name, rank in ranks.items())
    with pytest.raises(ValueError, match=r"--ranks 5,7.*weight_ih_l0.*4"):
        given_ranks(ARCHITECTURE.build(), "5,7")
