"""The radix selection against a sort."""

import pytest
import torch

from str_triton.budget.select import select


def kept_cost(values, costs, cut):
    return sum(int((value > cut).sum()) * cost for value, cost in zip(values, costs, strict=True))


@pytest.mark.parametrize("case", range(60))
def test_cuts_as_little_as_the_budget_allows(case):
    generator = torch.Generator().manual_seed(case)
    sizes = [int(torch.randint(0, 40, (), generator=generator)) + (i == 0) for i in range(4)]
    values = [torch.randn(n, generator=generator) * 10 ** (case % 5 - 2) for n in sizes]
    costs = torch.randint(1, 9, (4,), generator=generator).tolist()
    if case % 5 == 0:
        values[0] = values[0].round()  # ties
    if case % 7 == 0:
        values[1][: sizes[1] // 2] = torch.inf
    if case % 4 == 0:
        values[2][: sizes[2] // 2] = -torch.inf
    total = kept_cost(values, costs, -torch.inf)
    always = kept_cost([value.isposinf().float() for value in values], costs, 0)
    keep = int(torch.randint(0, total + 3, (), generator=generator))

    below, above = select(values, costs, torch.tensor(keep))

    keep = max(keep, always)  # inf is kept in any case
    assert kept_cost(values, costs, below) <= keep
    assert not any(((value > below) & (value < above)).any() for value in values)
    if total <= keep:
        assert below == -torch.inf
    else:  # Nothing smaller would do: below is a value, and with it the budget is passed.
        assert any((value == below).any() for value in values)
        with_below = sum(int((value >= below).sum()) * cost for value, cost in zip(values, costs, strict=True))
        assert with_below > keep


def test_large_values_and_costs_keep_their_order():
    values = [torch.tensor([-3e38, -1e-45, 0.0, 1e-45, 3e38])]
    below, above = select(values, [10**12], torch.tensor(2 * 10**12))
    assert (below, above) == (0.0, torch.tensor(1e-45))


def test_both_zeros_are_equal():
    below, above = select([torch.tensor([-0.0, 0.0, 1.0])], [1], torch.tensor(2))
    assert (below, above) == (0.0, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "ties", "infinite"])
def test_on_a_gpu_as_on_the_cpu(kind):
    values = [torch.randn(n) * 4 - 3 for n in (0, 1, 100_003, 1 << 14, 7)]
    if kind == "ties":
        values = [value.round() for value in values]
    if kind == "infinite":
        values = [value.where(value.abs() < 4, value.sign() * torch.inf) for value in values]
    costs = [5, 0, 3, 10**9, 1]
    total = kept_cost(values, costs, -torch.inf)
    for share in (0, 0.01, 0.5, 1):
        keep = torch.tensor(int(share * total))
        below, above = select([value.cuda() for value in values], costs, keep.cuda())
        assert (below.cpu(), above.cpu()) == select(values, costs, keep)
