"""soft_threshold on the CPU: against the paper's formula, over every layout, dtype and special value."""

from itertools import product

import pytest
import torch
from torch import Tensor

from str_triton import soft_threshold
from str_triton.ops.soft_threshold import PIECE
from tests import oracle
from tests.ops.soft_threshold_cases import (
    DTYPES,
    GRADIENTS,
    GRANULARITIES,
    SHAPES,
    Case,
    G,
    assert_matches,
    differentiate,
    example,
    fits,
    poisoned_allocations,
)

INF, NAN = float("inf"), float("nan")
ROW_AND_WEIGHT = ("one", "row", "weight")


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize(("shape", "granularity"), [c for c in product(SHAPES, GRANULARITIES) if fits(*c)])
def test_value_and_gradients(shape, granularity, g, gradient):
    case = example(shape, granularity, g)
    assert_matches(differentiate(soft_threshold, case, g=g, gradient=gradient), case, g, gradient)


@pytest.mark.parametrize("granularity", ROW_AND_WEIGHT)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("dtype", "raw_dtype"), DTYPES)
def test_dtypes(dtype, raw_dtype, gradient, granularity):
    for g in G:
        case = example((6, 345), granularity, g, dtype, raw_dtype)
        assert_matches(differentiate(soft_threshold, case, g=g, gradient=gradient), case, g, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_of_several_pieces(dtype, gradient):
    case = example((3, PIECE * 2 // 3 + 5), "one", dtype=dtype, raw_dtype=torch.float64)
    assert case.x.numel() > 2 * PIECE
    assert_matches(differentiate(soft_threshold, case, gradient=gradient), case, "sigmoid", gradient)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("g", G)
def test_gradcheck(g, granularity):
    x, raw, _ = example((4, 3, 2), granularity, g, torch.float64)
    alpha = oracle.threshold(raw.reshape(()) if raw.numel() == 1 else raw, g)
    x = x + 0.1 * x.sign() * ((x.abs() - alpha).abs() < 0.05)  # Away from the kink, which finite differences would see.
    raw.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, raw: soft_threshold(x, raw, g=g), (x.requires_grad_(), raw))
    # Straight-through is not the derivative of x by design; that of raw is exact all the same.
    x = x.detach()
    assert torch.autograd.gradcheck(lambda raw: soft_threshold(x, raw, g=g, gradient="straight_through"), (raw,))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors of x's shape and values, (8, 6, 4, 4), that lie in memory in different ways."""
    misaligned = torch.empty(x.numel() + 1)[1:].view(x.shape)
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.empty(8, 12, 4, 8)[:, ::2, :, ::2].copy_(x),
        "every second row": torch.empty(16, 6, 4, 4)[::2].copy_(x),
        "misaligned": misaligned.copy_(x),
    }


LAYOUTS = tuple(layouts(torch.zeros(8, 6, 4, 4)))


@pytest.mark.parametrize("granularity", ROW_AND_WEIGHT)
@pytest.mark.parametrize(("layout", "grad_layout"), list(product(LAYOUTS, LAYOUTS)))
def test_layouts(layout, grad_layout, granularity):
    case = example((8, 6, 4, 4), granularity)
    case = Case(layouts(case.x)[layout], case.raw, layouts(case.grad)[grad_layout])
    for gradient in GRADIENTS:
        result = differentiate(soft_threshold, case, gradient=gradient)
        assert_matches(result, case, "sigmoid", gradient)
    kept = layout in ("contiguous", "channels_last", "misaligned") or (layout == "transposed" and granularity != "row")
    assert result.out.stride() == (case.x.stride() if kept else case.x.contiguous().stride())


@pytest.mark.parametrize("raw_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_threshold_per_weight_of_another_layout(layout, raw_layout):
    case = example((8, 6, 4, 4), "weight")
    case = Case(layouts(case.x)[layout], layouts(case.raw)[raw_layout], case.grad)
    assert_matches(differentiate(soft_threshold, case), case, "sigmoid", "masked")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("granularity", ROW_AND_WEIGHT)
def test_expanded_tensors(granularity, gradient):
    case = example((8, 6, 4, 4), granularity)
    x, raw = case.x[:, :1, :1, :1].expand(8, 6, 4, 4), case.raw
    for grad in (torch.ones(()).expand(8, 6, 4, 4), torch.randn(1, 6, 1, 4).expand(8, 6, 4, 4)):
        case = Case(x, raw, grad)
        assert_matches(differentiate(soft_threshold, case, gradient=gradient), case, "sigmoid", gradient)
    x, raw = x.clone().requires_grad_(), raw.clone().requires_grad_()
    soft_threshold(x, raw, gradient=gradient).sum().backward()
    assert_matches(
        (soft_threshold(x, raw).detach(), x.grad, raw.grad), Case(x, raw, torch.ones_like(x)), "sigmoid", gradient
    )


@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize("granularity", ROW_AND_WEIGHT)
def test_nan_and_infinity_give_what_the_formula_gives(granularity, g):
    """Every pair of special values; where the formula has a NaN so have we, elsewhere the very value."""
    specials = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 50.0])
    x, raw = specials.expand(8, 8).clone(), specials.unsqueeze(1)
    if granularity == "one":
        got = torch.stack([soft_threshold(row, s, g=g) for row, s in zip(x, raw, strict=True)])
    else:
        got = soft_threshold(x, raw if granularity == "row" else raw.expand(8, 8), g=g)
    want = oracle.soft_threshold(x.double(), raw.double(), g).float()
    torch.testing.assert_close(got, want, equal_nan=True)


def test_nan_and_the_gradient_of_the_threshold():
    """A NaN among the weights has no sign and adds nothing; a threshold that is NaN has the gradient NaN."""
    case = Case(torch.tensor([NAN, 2.0, -2.0, 0.1]), torch.tensor(0.0), torch.tensor([3.0, 5.0, 7.0, 11.0]))
    result = differentiate(soft_threshold, case)
    torch.testing.assert_close(result.grad_raw, torch.tensor(-0.25 * (5 - 7)))
    result = differentiate(soft_threshold, case._replace(raw=torch.tensor(NAN)))
    assert result.out.isnan().all()
    assert result.grad_raw.isnan()


@pytest.mark.parametrize("granularity", ROW_AND_WEIGHT)
def test_a_tie_is_pruned(granularity):
    x, grad = torch.tensor([[0.5, -0.5, 0.75], [-0.75, 0.0, 0.5]]), torch.full((2, 3), 2.0)
    raw = {"one": torch.tensor(0.5), "row": torch.full((2, 1), 0.5), "weight": torch.full((2, 3), 0.5)}[granularity]
    result = differentiate(soft_threshold, Case(x, raw, grad), g="identity")
    assert torch.equal(result.out, torch.tensor([[0, 0, 0.25], [-0.25, 0, 0]]))
    assert torch.equal(result.grad_x, torch.tensor([[0.0, 0, 2], [2, 0, 0]]))
    want = {
        "one": torch.tensor(0.0),
        "row": torch.tensor([[-2.0], [2]]),
        "weight": torch.tensor([[0.0, 0, -2], [2, 0, 0]]),
    }
    assert torch.equal(result.grad_raw, want[granularity])


@pytest.mark.parametrize("granularity", ROW_AND_WEIGHT)
def test_identity_takes_a_negative_threshold_as_zero(granularity):
    case = example((3, 5), granularity, "identity")
    case = case._replace(raw=-case.raw.abs())
    result = differentiate(soft_threshold, case, g="identity")
    assert torch.equal(result.out, case.x)
    assert torch.equal(result.grad_x, case.grad)
    assert not result.grad_raw.any()


def test_identity_at_zero_can_grow():
    result = differentiate(soft_threshold, Case(torch.ones(3), torch.tensor(0.0), torch.ones(3)), g="identity")
    assert torch.equal(result.grad_raw, torch.tensor(-3.0))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("raw", "threshold"), [(-200.0, 0.0), (-25.0, 1.3887944e-11)])
def test_underflow(raw, threshold, autocast):
    """sigmoid(-200) is 0 in float32: nothing is pruned and s has no gradient. sigmoid(-25) is 0 in float16 alone."""
    case = Case(torch.tensor([1e-11, -1.0, 2e-11]), torch.tensor([[raw]]), torch.tensor([1.0, 2.0, 4.0]))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        result = differentiate(soft_threshold, case)
    assert result.out.dtype == torch.float32
    want = torch.tensor([0.0 if threshold else 1e-11, -1.0, 2e-11 - threshold])
    torch.testing.assert_close(result.out, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.grad_raw, torch.tensor([[threshold * (2.0 - 4.0)]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("granularity", ROW_AND_WEIGHT)
def test_the_same_inputs_give_the_same_bits(granularity, gradient):
    case = example((64, 3, 33, 17), granularity)
    first, second = (differentiate(soft_threshold, case, gradient=gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_is_needed_is_differentiated():
    x, raw, grad = example((5, 7))
    for gradient in GRADIENTS:
        want = differentiate(soft_threshold, Case(x, raw, grad), gradient=gradient)
        (grad_x,) = torch.autograd.grad(soft_threshold(x.requires_grad_(), raw, gradient=gradient), x, grad)
        (grad_raw,) = torch.autograd.grad(
            soft_threshold(x.detach(), raw.requires_grad_(), gradient=gradient), raw, grad
        )
        assert torch.equal(grad_x, want.grad_x)
        assert torch.equal(grad_raw, want.grad_raw)
        x, raw = x.detach(), raw.detach()
    assert not soft_threshold(x, raw).requires_grad


@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
def test_a_threshold_that_does_not_learn_stays_in_the_graph(gradient):
    x, raw = torch.randn(4, 5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    reached = []
    node = raw.view_as(raw).grad_fn.next_functions[0][0]  # DistributedDataParallel hangs a hook on it.
    node.register_hook(lambda *_: reached.append(1))
    soft_threshold(x, raw, gradient=gradient, learn_threshold=False).sum().backward()
    assert raw.grad is None
    assert reached == [1]
    expected = x.detach().clone().requires_grad_()
    soft_threshold(expected, raw.detach(), gradient=gradient).sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_differentiable_once():
    x, raw, _ = example((5,))
    loss = soft_threshold(x.requires_grad_(), raw).square().sum()
    (grad_x,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_a_result_changed_in_place_is_noticed():
    x, raw, _ = example((5,))
    out = soft_threshold(x.requires_grad_(), raw)
    with torch.no_grad():
        out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
