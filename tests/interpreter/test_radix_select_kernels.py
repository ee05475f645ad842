"""Oracle 3: the radix selection's kernels in Triton's interpreter, beside the CPU, a sort, the host's allocation."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from str_triton import SparsityController, Target, sparsify
from str_triton.budget.select import select
from str_triton.ops import radix_select as ops
from tests.ops.soft_threshold_cases import poisoned_allocations

INF = float("inf")
SPECIALS = torch.tensor([INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0])
SIZES = (0, 1, 127, 256, 0, 261)  # None, one, less than a block, exactly a program's span, and a rest.


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "SPAN", 256)
    monkeypatch.setattr(ops, "BLOCK", 128)


@contextmanager
def launchers() -> Iterator[None]:
    """The ops on the CPU are what they are on a GPU."""
    with (
        mock.patch.object(torch.ops.str_triton, "radix_select_histogram", ops._histogram_triton),
        mock.patch.object(torch.ops.str_triton, "radix_select_least", ops._least_triton),
        poisoned_allocations(),
    ):
        yield


def values_of(kind: str) -> list[Tensor]:
    values = [torch.randn(size) * 4 - 3 for size in SIZES]
    if kind == "ties":
        values = [value.round() for value in values]
    if kind == "specials":
        values = [SPECIALS[torch.randint(len(SPECIALS), (size,))] for size in SIZES]
    return values


@pytest.mark.parametrize(("kind", "aligned"), [("random", True), ("ties", False), ("specials", True)])
def test_bits_of_the_cpu(kind, aligned):
    values = values_of(kind)
    if not aligned:
        values = [torch.cat((value.new_zeros(1), value))[1:] for value in values]
    costs, key = [7, 0, 1, 10**12, 5, 3], ops.keys(values[3][5])
    for shift in (24, 16, 8, 0):
        arguments = values, costs, key >> (shift + 8), shift
        assert torch.equal(ops._histogram_triton(*arguments), ops._histogram(*arguments))
    for cut in (*SPECIALS, values[3][5]):
        assert torch.equal(ops._least_triton(values, cut), ops._least(values, cut))


@pytest.mark.parametrize(
    ("kind", "share"),
    [("random", 0.03), ("random", 1), ("ties", 0.5), ("ties", 0.03), ("specials", 0), ("specials", 0.5)],
)
def test_the_cut_of_a_sort(kind, share):
    values, costs = values_of(kind), [1, 2, 3, 4, 5, 6]
    everything = torch.cat(values)
    cost = torch.cat([torch.full(value.shape, c) for value, c in zip(values, costs, strict=True)])
    keep = int(share * cost.sum())
    with launchers():
        below, above = select(values, costs, torch.tensor(keep))
    keep = max(keep, int(cost[everything == INF].sum()))  # inf is kept in any case
    distinct = everything.unique()  # sorted
    kept = torch.stack([cost[everything > value].sum() for value in distinct])
    assert cost[everything > below].sum() <= keep
    assert (kept[distinct < below] > keep).all()
    if below > -INF:
        assert (everything == below).any()
        assert cost[everything >= below].sum() > keep
    assert above == torch.where(everything > below, everything, INF).amin()


@pytest.mark.parametrize(
    ("dtype", "granularity"),
    [
        (torch.float32, "layer"),
        (torch.float32, "filter"),
        (torch.bfloat16, "layer"),
        (torch.bfloat16, "weight"),
        (torch.float16, "layer"),
        (torch.float64, "layer"),
    ],
    ids=str,
)
def test_layers_of_a_controller(dtype, granularity):
    """The offset keeps as many weights as the host's allocation, up to those that are equal to rounding."""
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten(), nn.Linear(36, 12), nn.Linear(12, 5)).to(dtype)
    with torch.no_grad():
        model[2].weight.copy_((model[2].weight * 40).round() / 40)  # repetitions
    target = {"sparsity": 0.8} if granularity == "filter" else {"flops": 800}
    controller = SparsityController(
        sparsify(model, granularity=granularity),
        Target(**target),
        example_input=torch.zeros(1, 3, 4, 4, dtype=dtype),
        floor=0.5 if granularity == "layer" else 0,
    )
    want = controller._cut(0.9)
    with launchers():
        below, above, caps = controller._cut(0.9)
    assert (below, above, caps) == want
    _, _, kept = controller._allocated(0.9)
    costs, least, most = [layer.cost for layer in controller._layers], 0, 0
    for layer, cost, count in zip(controller._layers, costs, kept, strict=True):
        offsets = layer.weight.pruning_offsets().flatten().float()
        certain, possible = int((offsets > below).sum()), int((offsets >= below).sum())
        least, most = least + cost * max(certain, layer.floor), most + cost * max(possible, layer.floor)
        assert max(certain, layer.floor) <= count <= max(possible, layer.floor)
    assert least <= int(controller._budget(0.9)) < most
