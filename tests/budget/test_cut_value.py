"""The radix selection against a sort."""

import pytest
import torch

from str_triton.budget.cut_value import cut_value
from str_triton.budget.processes import ALONE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(12))
def test_the_cut_is_where_the_budget_ends(case: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(case)
    values = torch.randn(50, generator=generator, dtype=dtype) * 10.0 ** (case - 6)
    values[::7] = values[3]
    values[5], values[6], values[8] = torch.inf, -torch.inf, 0.0
    costs = torch.randint(0, 4, (50,), generator=generator)
    for budget in range(int(costs.sum())):
        cut = cut_value(values, costs, budget, ALONE)
        assert cut in values
        assert int(costs[values > cut].sum()) <= budget < int(costs[values >= cut].sum())
    assert cut_value(values, costs, int(costs.sum()), ALONE) is None


def test_zeros_of_both_signs_are_equal() -> None:
    values = torch.tensor([-0.0, 0.0, -1.0, 1.0])
    assert [cut_value(values, 1, budget, ALONE) for budget in range(5)] == [1.0, 0.0, 0.0, -1.0, None]
