"""low_rank_fastgrnn on the CPU: the cell's scalars and biases. Every cell: test_low_rank_cells.py."""

from dataclasses import replace

import pytest
import torch

from str_triton import low_rank_fastgrnn
from tests.messages import holding
from tests.ops.low_rank_cases import TOLERANCE, assert_matches, differentiate, example, expected


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(("zeta", "nu"), [(1.0, -4.0), (-3.0, 2.0), (40.0, -200.0)])
def test_zeta_and_nu(zeta, nu, shape):
    """The paper's values of both at the start, and those where a sigmoid is 1 or 0."""
    case = example("fastgrnn", lengths="any order")
    case.tensors |= {name: torch.full((1,), raw).double() for name, raw in (("zeta", zeta), ("nu", nu))}
    want = expected(case)
    case.tensors |= {name: case.tensors[name].reshape(shape) for name in ("zeta", "nu")}
    got = differentiate(low_rank_fastgrnn, case)
    assert (got["grad of zeta"].shape, got["grad of nu"].shape) == (shape, shape)
    got |= {name: got[name].reshape(1) for name in ("grad of zeta", "grad of nu")}
    assert_matches(got, want, TOLERANCE[torch.float64])


@pytest.mark.parametrize("missing", ["bias_gate", "bias_update"])
def test_one_bias(missing):
    case = example("fastgrnn")
    case.tensors[missing] = None
    assert_matches(differentiate(low_rank_fastgrnn, case), expected(case), TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["zeta", "nu"])
def test_not_one_element(name):
    case = example("fastgrnn")
    case = replace(case, tensors=case.tensors | {name: torch.zeros(6)})
    with pytest.raises(ValueError, match=holding(f"{name} .. (6,)")):
        case.call(low_rank_fastgrnn)
