"""The exact allocation against a sort of all elements at once."""

import math

import pytest
import torch

from str_triton.budget import allocate as module
from str_triton.budget.allocate import NotANumberError, Source, allocate


def expected(sources: list[Source], budget: int) -> list[int]:
    """Walk down all elements, the largest first, equal ones in order, after setting the floors aside."""
    offsets = [torch.cat(list(source.pieces())) for source in sources]
    floored: dict[int, int] = {}
    while True:
        left = max(0, budget - sum(sources[i].cost * n for i, n in floored.items()))
        kept = [floored.get(i, 0) for i in range(len(sources))]
        entries = sorted(
            (-value, i, place)
            for i, source in enumerate(offsets)
            if i not in floored
            for place, value in enumerate(source.tolist())
            if value > -float("inf")
        )
        blocked: float | None = None  # at this value the budget has run out for somebody
        for value, i, _ in entries:
            if blocked is not None and value > blocked:
                break
            if sources[i].cost <= left:
                kept[i] += 1
                left -= sources[i].cost
            else:
                blocked = value
        available = [int((source > -torch.inf).sum()) for source in offsets]
        low = [i for i in range(len(sources)) if i not in floored and kept[i] < min(sources[i].floor, available[i])]
        if not low:
            return kept
        floored |= {i: min(sources[i].floor, available[i]) for i in low}


@pytest.mark.parametrize("sample", [1 << 17, 64])
@pytest.mark.parametrize("case", range(120))
def test_the_same_as_a_sort(case, sample, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", sample)
    monkeypatch.setattr(module, "PIECE", 16)
    generator = torch.Generator().manual_seed(case)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sources = []
    for _ in range(number(1, 5)):
        shape = [number(1, 9), number(1, 30)]
        weight = torch.randn(shape, generator=generator)
        if case % 2:
            weight = (weight * (1 + case % 4)).round()
        if case % 8 == 1:
            weight[weight.abs() > 1] = torch.inf  # an offset of inf, which nothing cuts
        cost = number(0, 4) if case % 3 == 0 else 1
        floor = number(0, 4) if case % 5 < 2 else 0
        reference = torch.randn((shape[0], 1) if case % 7 == 0 else (1,), generator=generator)
        sources.append(Source(weight, torch.log, reference if case % 2 == 0 else torch.zeros(1), cost, floor))
    total = sum(source.cost * source.weight.numel() for source in sources)
    least = sum(source.cost * source.floor for source in sources)
    budget = max(least, number(0, total + 2))
    found = allocate(sources, budget)
    assert found.kept == expected(sources, budget)
    assert math.isfinite(found.offset)
    for source, kept, cap in zip(sources, found.kept, found.caps, strict=True):
        offsets = torch.cat(list(source.pieces()))
        offset = min(found.offset, cap)
        # Up to ties, the offsets keep what they should: no element that is to be cut lies above one that is kept.
        assert int((offsets > offset).sum()) >= kept or not kept
        ordered = offsets.sort(descending=True).values
        if 0 < kept < len(ordered):
            assert int((offsets > offset).sum()) - kept <= int((ordered == ordered[kept]).sum())


@pytest.mark.parametrize("bracket", [(-9.0, -8.0), (-9.0, -1.0), (-0.1, 0.1), (0.5, math.inf), (8.0, 9.0)], ids=str)
def test_a_wrong_guess_of_the_cut_changes_nothing(bracket, monkeypatch):
    sources = [Source(torch.randn(30, 20).mul(factor).round() / 4, torch.log, torch.zeros(1)) for factor in (3, 4)]
    found = [allocate(sources, budget) for budget in (1, 500, 900)]
    monkeypatch.setattr(module, "_bracket", lambda *_: bracket)
    assert [allocate(sources, budget) for budget in (1, 500, 900)] == found


def test_a_memory_format_changes_nothing():
    weight = torch.randn(8, 6, 3, 3).round()
    found = [
        allocate([Source(w, torch.log, torch.zeros(1))], 100)
        for w in (weight, weight.to(memory_format=torch.channels_last))
    ]
    assert found[0] == found[1]


def test_a_budget_for_everything_keeps_all_but_zeros():
    weight = torch.tensor([0.0, 0.5, -2.0, 0.0])
    found = allocate([Source(weight, torch.log, torch.zeros(1)), Source(weight[:1], torch.log, torch.zeros(1))], 100)
    assert found.kept == [2, 0]
    assert -torch.inf < found.offset < math.log(0.5)


def test_a_small_budget_empties_a_source_without_a_floor():
    sources = [Source(torch.full((2,), value), torch.log, torch.zeros(1)) for value in (1.0, 2.0)]
    assert [allocate(sources, budget).kept for budget in (0, 1, 2, 3)] == [[0, 0], [0, 1], [0, 2], [1, 2]]


def test_a_weight_that_is_nan_is_named():
    weights = [torch.randn(40, 40) for _ in range(3)]
    weights[1][7, 9] = torch.nan
    for budget in (100, 10**6):
        with pytest.raises(NotANumberError) as error:
            allocate([Source(weight, torch.log, torch.zeros(1)) for weight in weights], budget)
        assert error.value.index == 1
