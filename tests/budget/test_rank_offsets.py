"""Components that come back because the budget has room: which ones, and how far their threshold is lowered."""

from math import inf

import pytest

from str_triton.budget.rank_offsets import filling_shifts

COSTS = [[0, 10, 20, 30], [0, 4, 8, 9]]


@pytest.mark.parametrize(
    ("offsets", "budget", "tie", "expected"),
    [
        pytest.param([[3.0, -0.5, -2.0], [1.0, -1.0, -4.0]], 17, 0.0, [0.0, 0.0], id="no room"),
        pytest.param([[3.0, -0.5, -2.0], [1.0, -1.0, -4.0]], 18, 0.0, [0.0, -2.0], id="the other matrix's fits"),
        pytest.param([[3.0, -0.5, -2.0], [1.0, -1.0, -4.0]], 24, 0.0, [-1.25, 0.0], id="the largest offset first"),
        pytest.param([[3.0, -0.5, -2.0], [1.0, -1.0, -4.0]], 28, 0.0, [-1.25, -2.0], id="then another"),
        pytest.param([[3.0, -0.5, -2.0], [1.0, -1.0, -2.0]], 19, 0.0, [0.0, -3.0], id="the last component"),
        pytest.param([[3.0, 2.0, 1.0], [2.0, 1.0, 0.5]], 50, 0.0, [0.0, 0.0], id="all are left"),
        pytest.param([[3.0, -0.5, -2.0], [1.0, -1.0, -1.0]], 50, 0.0, [-3.0, 0.0], id="equals stay away"),
        pytest.param([[3.0, -0.5, -0.6], [1.0, -1.0, -4.0]], 28, 0.2, [0.0, -5.0], id="nearly equal ones too"),
        pytest.param([[3.0, -inf, -inf], [1.0, -1.0, -inf]], 50, 0.0, [0.0, -2.0], id="those of size 0 as well"),
    ],
)
def test_the_components_that_fit_come_back(offsets, budget, tie, expected):
    assert filling_shifts(offsets, COSTS, budget, tie) == expected
