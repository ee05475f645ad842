"""soft_threshold_many: the same bits as a loop over soft_threshold, forward and backward."""

import pytest
import torch
from torch import Tensor

from str_triton import soft_threshold, soft_threshold_many
from tests.ops.soft_threshold_cases import DTYPES, GRADIENTS, G, example, poisoned_allocations

# One element, odd sizes (gaps in the flat buffer), exact blocks, none at all, several blocks.
SHAPES = ((1, 1), (3, 341), (2, 1040), (0, 4), (5, 3, 3, 3), (64, 16), (1, 1, 1, 1), (7, 33))


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


def loop(xs: list[Tensor], raws: list[Tensor], **options: str) -> list[Tensor]:
    return [soft_threshold(x, raw, **options) for x, raw in zip(xs, raws, strict=True)]


def differentiate(function, xs: list[Tensor], raws: list[Tensor], grads: list[Tensor], **options: str) -> list[Tensor]:
    """Values, then the gradients of the distinct tensors among xs and raws."""
    xs, raws = list(xs), list(raws)
    leaves = list({id(tensor): tensor for tensor in xs + raws}.values())
    for leaf in leaves:
        leaf.requires_grad_()
    outs = function(xs, raws, **options)
    return [out.detach() for out in outs] + list(torch.autograd.grad(outs, leaves, grads))


def assert_same_bits(xs: list[Tensor], raws: list[Tensor], grads: list[Tensor], **options: str) -> None:
    many, single = (differentiate(f, xs, raws, grads, **options) for f in (soft_threshold_many, loop))
    assert len(many) == len(single)
    for a, b in zip(many, single, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize("granularity", ["one", "one_of_the_paper", "row", "weight"])
def test_the_same_bits_as_a_loop(granularity, g, gradient):
    xs, raws, grads = zip(*(example(shape, granularity, g) for shape in SHAPES), strict=True)
    assert_same_bits(xs, raws, grads, g=g, gradient=gradient)


@pytest.mark.parametrize(("dtype", "raw_dtype"), DTYPES)
@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
def test_dtypes(granularity, dtype, raw_dtype):
    cases = [example(shape, granularity, dtype=dtype, raw_dtype=raw_dtype) for shape in SHAPES]
    assert_same_bits(*zip(*cases, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_granularities_mixed(gradient):
    cases = [example((6, 5, 3), granularity) for granularity in ("one", "row", "one_of_the_paper")]
    assert_same_bits(*zip(*cases, strict=True), gradient=gradient)


@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
def test_layouts(granularity):
    shape = (8, 6, 4, 4)
    xs, raws, grads = (list(kind) for kind in zip(*(example(shape, granularity) for _ in range(5)), strict=True))
    xs[0] = xs[0].contiguous(memory_format=torch.channels_last)
    xs[1] = xs[1].transpose(0, 1).contiguous().transpose(0, 1)
    xs[2] = torch.empty(8, 12, 4, 8)[:, ::2, :, ::2].copy_(xs[2])
    xs[3] = torch.empty(xs[3].numel() + 1)[1:].view(shape).copy_(xs[3])
    grads[1] = torch.ones(()).expand(shape)
    grads[3] = grads[3].contiguous(memory_format=torch.channels_last)
    grads[4] = torch.empty(grads[4].numel() + 1)[1:].view(shape).copy_(grads[4])
    if granularity == "weight":
        raws[2] = raws[2].contiguous(memory_format=torch.channels_last)
    assert_same_bits(xs, raws, grads)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
def test_one_threshold_for_all_and_one_tensor_twice(granularity, gradient):
    """The gradients of a shared tensor add up. Of two: two numbers have one sum, three have several."""
    (x, raw, grad), (other, _, other_grad) = (example((6, 5, 3), granularity) for _ in range(2))
    assert_same_bits([x, other], [raw, raw], [grad, other_grad], gradient=gradient)
    assert_same_bits([x, x], [raw, raw], [grad, other_grad], gradient=gradient)
    arguments = [x, other, x], [raw] * 3, [grad, other_grad, grad]
    many, single = (differentiate(f, *arguments, gradient=gradient) for f in (soft_threshold_many, loop))
    for a, b in zip(many, single, strict=True):
        torch.testing.assert_close(a, b)


def test_a_result_that_is_not_used_has_gradient_zero():
    (x, raw, grad), (other, other_raw, _) = example((4, 3)), example((5,))
    for tensor in (x, raw, other, other_raw):
        tensor.requires_grad_()
    out, _ = soft_threshold_many([x, other], [raw, other_raw])
    out.backward(grad)
    assert x.grad.any()
    assert not other.grad.any()
    assert not other_raw.grad.any()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("learned", [0, 1])
def test_one_tensor_of_all_is_learned(learned, gradient):
    """Its gradient is that of all tensors learned, whether it is one of the weights or one of the thresholds."""
    xs, raws, grads = (list(kind) for kind in zip(*(example((4, 3)) for _ in range(2)), strict=True))
    expected = differentiate(soft_threshold_many, xs, raws, grads, gradient=gradient)[2:]
    for place, want in ((learned, expected[learned]), (2 + learned, expected[2 + learned])):
        tensors = [tensor.detach() for tensor in (*xs, *raws)]
        tensors[place].requires_grad_()
        outs = soft_threshold_many(tensors[:2], tensors[2:], gradient=gradient)
        (got,) = torch.autograd.grad(outs, tensors[place], grads)
        assert torch.equal(got, want)


def test_results_do_not_share_memory():
    xs, raws, _ = zip(*(example((3, 7)) for _ in range(2)), strict=True)
    first, second = soft_threshold_many(xs, raws)
    before = second.clone()
    first.fill_(7)
    assert torch.equal(second, before)


@pytest.mark.parametrize("masked", [True, False])
def test_gaps_in_the_flat_buffers_are_zero(masked):
    """They are outputs of the registered ops, and the same inputs must give the same outputs."""
    xs, _, grads = zip(*(example(shape, "weight") for shape in ((3,), (5, 7), (16,))), strict=True)
    thresholds, alpha = [3, 35, 16], torch.rand(16 + 48 + 16)
    flat = torch.ops.str_triton.soft_threshold_many(xs, alpha, thresholds)
    grad_flat, grad_raw = torch.ops.str_triton.soft_threshold_many_backward(grads, flat, alpha, thresholds, masked)
    assert len(flat) == len(grad_raw) == 16 + 48 + 16
    for buffer in (flat, grad_raw, grad_flat) if masked else (flat, grad_raw):
        assert not buffer[3:16].any()
        assert not buffer[16 + 35 : 64].any()
    assert len(grad_flat) == (len(flat) if masked else 0)


def test_nothing_gives_nothing():
    assert soft_threshold_many([], []) == []
    (out,) = soft_threshold_many((torch.zeros(0, 3),), (torch.zeros(1),))
    assert out.shape == (0, 3)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_same_inputs_give_the_same_bits(gradient):
    arguments = list(zip(*(example(shape) for shape in ((64, 3, 33, 17), (5,))), strict=True))
    first, second = (differentiate(soft_threshold_many, *arguments, gradient=gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
