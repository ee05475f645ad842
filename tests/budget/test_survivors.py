"""Exact numbers of survivors where a threshold cannot tell elements apart."""

import pytest
import torch
from torch import nn

from str_triton import sparsify
from str_triton.budget.processes import ALONE
from str_triton.budget.survivors import keep_exactly
from str_triton.nn import thresholded_weights

VALUES = [0.5, -0.25, 0.125, -0.125, 0.125, 0.0, -0.5, 0.375]


def thresholded(dtype, threshold):
    model = sparsify(nn.Linear(4, 2, bias=False).to(dtype), g="identity")
    (weight,) = thresholded_weights(model)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(VALUES).reshape(2, 4))
    return model, weight, torch.tensor([threshold], dtype=torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize(("excess", "places"), [(1, [7]), (2, [6, 7]), (3, [0, 6, 7]), (9, [0, 6, 7])])
def test_too_many_survive(excess, places):
    """The smallest go, of equal ones the last, to the magnitude of the threshold."""
    model, weight, raw = thresholded(torch.float32, 0.3)
    changed, old = keep_exactly(weight, raw, excess, ALONE)
    assert sorted(changed.tolist()) == places
    expected = torch.tensor(VALUES)
    assert torch.equal(old, expected[changed])
    expected[places] = torch.copysign(raw, expected[places])
    assert torch.equal(model.weight.flatten(), expected)


@pytest.mark.parametrize(("excess", "places"), [(-1, [1]), (-2, [1, 2]), (-3, [1, 2, 3]), (-9, [1, 2, 3, 4])])
@pytest.mark.parametrize(
    ("dtype", "threshold", "least"),
    [
        (torch.float32, 0.3, 0.3 + 2**-25),
        (torch.float64, 0.3, 0.3 + 2**-54),
        (torch.bfloat16, 0.3, 0.30078125),
        (torch.float16, 0.25 + 2**-13, 0.25 + 2**-12),
        (torch.float16, 0.25 - 2**-26, 0.25 + 2**-12),  # 0.25 less the threshold is 0 in float16.
    ],
)
def test_too_few_survive(dtype, threshold, least, excess, places):
    """The largest of the others come back, of equal ones the first, with the least magnitude that survives."""
    model, weight, raw = thresholded(dtype, threshold)
    changed, old = keep_exactly(weight, raw, excess, ALONE)
    assert sorted(changed.tolist()) == places
    expected = torch.tensor(VALUES, dtype=dtype)
    assert torch.equal(old, expected[changed])
    expected[places] = torch.copysign(torch.tensor(least, dtype=dtype), expected[places])
    assert torch.equal(model.weight.flatten(), expected)
    assert torch.equal(weight.holder.apply_threshold(model.weight, raw).flatten() != 0, expected.abs() >= least)


def test_nothing_can_come_back():
    model, weight, raw = thresholded(torch.float32, 0.3)
    with torch.no_grad():
        model.weight.zero_()
    assert keep_exactly(weight, raw, -1, ALONE) is None
