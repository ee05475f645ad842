"""Oracle 3: the soft-threshold kernels in Triton's interpreter, through their launchers, against the CPU."""

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from str_triton.kernels import soft_threshold as kernels
from str_triton.ops import soft_threshold as ops
from str_triton.ops import soft_threshold_many as many
from str_triton.ops.thresholds import threshold_function
from tests.ops.soft_threshold_cases import DTYPES, G, example, fits, poisoned_allocations

INF, NAN = float("inf"), float("nan")
SHAPES = ((), (1,), (1023,), (1025,), (0, 4), (2, 0, 3), (3, 341), (2, 1040), (3, 1025), (5, 3, 3, 3))
GRANULARITIES = ("one_of_the_paper", "row", "weight")
# Sums are added up in another order; the interpreter's stores to bfloat16 truncate.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


def assert_close(got: Tensor, want: Tensor, magnitude: float = 1.0) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    atol = TOLERANCE[torch.promote_types(got.dtype, torch.float32)] * magnitude
    torch.testing.assert_close(got, want, rtol=TOLERANCE[got.dtype], atol=atol, equal_nan=True)


def numbers(x: Tensor, raw: Tensor, g: str) -> tuple[Tensor, Tensor]:
    """alpha and the slope, as the ops get them."""
    raw = raw.to(ops.compute_dtype(x, raw))
    return threshold_function(g).value(raw), threshold_function(g).derivative(raw)


def check(x: Tensor, raw: Tensor, grad: Tensor, g: str) -> None:
    """Forward, then the backwards from the very same output."""
    x, raw = ops._prepared(x, raw)
    alpha, slope = numbers(x, raw, g)
    out = ops._forward(x, alpha)
    assert_close(got := ops._forward_triton(x, alpha), out)
    assert got.stride() == out.stride()
    grad = ops._laid_out(grad, out.stride())
    for learned, masked in ((slope, True), (slope, False), (None, True)):
        grad_x, grad_raw = ops._backward_triton(grad, out, learned, masked)
        want_x, want_raw = ops._backward(grad, out, learned, masked)
        assert torch.equal(grad_x, want_x)
        assert grad_x.stride() == want_x.stride()
        assert_close(grad_raw, want_raw, magnitude=max(1.0, x.numel() ** 0.5))


@pytest.mark.parametrize(("shape", "granularity"), [c for c in product(SHAPES, GRANULARITIES) if fits(*c)])
def test_shapes(shape, granularity):
    check(*example(shape, granularity), "sigmoid")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("g", G)
def test_threshold_functions(g, granularity):
    check(*example((3, 345), granularity, g), g)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "raw_dtype"), DTYPES)
def test_dtypes(dtype, raw_dtype, granularity):
    check(*example((3, 345), granularity, "softplus", dtype, raw_dtype), "softplus")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layouts(granularity):
    x, raw, grad = example((6, 3, 5, 4), granularity)
    check(x.contiguous(memory_format=torch.channels_last), raw, grad, "sigmoid")
    check(
        x.transpose(0, 1).contiguous().transpose(0, 1), raw, grad.contiguous(memory_format=torch.channels_last), "exp"
    )
    check(x[:, ::2], raw[:, ::2], torch.ones(()).expand(6, 2, 5, 4), "identity")


SPECIALS = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 0.5, -0.5, 50.0, -200.0, 200.0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize("granularity", ["row", "weight"])
def test_special_values(granularity, g):
    """Every pair of NaN, infinities, zeros, ties, and thresholds that under- and overflow."""
    x, raw = SPECIALS.repeat(10, 1), SPECIALS.unsqueeze(1)
    raw = raw if granularity == "row" else raw.repeat(1, 10)
    alpha, _ = numbers(x, raw, g)
    torch.testing.assert_close(ops._forward_triton(x, alpha), ops._forward(x, alpha), equal_nan=True)


@pytest.mark.parametrize(("dtype", "raw_dtype"), DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("g", G)
def test_the_same_weights_survive(g, granularity, dtype, raw_dtype):
    """Bit for bit, also weights at the threshold and the next numbers of their dtype on either side of it."""
    raw = torch.linspace(-0.5, 0.7, 8)[:, None].to(raw_dtype)
    raw = {"one_of_the_paper": raw[6:7], "row": raw, "weight": raw.repeat(1, 50)}[granularity]
    alpha, _ = numbers(torch.empty(0, dtype=dtype), raw, g)
    at = alpha.expand(8, 50).to(dtype)
    toward = torch.tensor([-torch.inf, torch.inf]).to(dtype)
    below, above = (torch.nextafter(at, end) for end in toward)
    x = torch.where(torch.rand(at.shape) < 0.5, at, torch.where(torch.rand(at.shape) < 0.5, below, above))
    x = (x * torch.randn(at.shape).sign()).contiguous()
    want, got = (f(x, alpha) for f in (ops._forward, ops._forward_triton))
    (many_got,) = many._forward_many_triton([x], alpha.flatten(), [alpha.numel()]).view(1, 8, 50)
    assert torch.equal(got != 0, want != 0)
    assert torch.equal(many_got != 0, want != 0)
    assert ((want == 0) == (x.to(alpha.dtype).abs() <= alpha)).all() or dtype == torch.float16
    assert (want == 0).any()
    assert (want != 0).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize("granularity", ["row", "weight"])
def test_gradients_of_special_values(granularity, g, masked):
    """Any gradient meets any output and threshold, but NaN outputs: torch masks them by their place in a vector."""
    raw, out, grad = torch.cartesian_prod(SPECIALS, SPECIALS[1:], SPECIALS).T
    if granularity == "row":  # Each row sums two elements of a kind; 31 takes every value of each factor in turn.
        keep = torch.arange(len(raw)) % 31 == 0
        raw, out, grad = raw[keep].unsqueeze(1), out[keep].repeat(2, 1).T, grad[keep].repeat(2, 1).T
    arguments = grad.contiguous(), out.contiguous(), numbers(out, raw.contiguous(), g)[1], masked
    for got, want in zip(ops._backward_triton(*arguments), ops._backward(*arguments), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def check_many(cases: list[tuple[Tensor, Tensor, Tensor]], g: str = "sigmoid") -> None:
    """The bits of a loop over the kernels for one tensor."""
    xs, raws, grads = (list(kind) for kind in zip(*cases, strict=True))
    xs, raws = (list(kind) for kind in zip(*map(ops._prepared, xs, raws), strict=True))
    alphas, slopes = zip(*(numbers(x, raw, g) for x, raw in zip(xs, raws, strict=True)), strict=True)
    alpha, slope = (many._joined(xs, list(pieces)) for pieces in (alphas, slopes))
    thresholds = [raw.numel() for raw in raws]
    flat = many._forward_many_triton(xs, alpha, thresholds)
    starts, _ = many._flat_starts(xs)
    outs = [many._view(flat, x, start) for x, start in zip(xs, starts, strict=True)]
    grads = [ops._laid_out(grad, out.stride()) for grad, out in zip(grads, outs, strict=True)]
    for x, piece, out in zip(xs, alphas, outs, strict=True):
        assert torch.equal(out, ops._forward_triton(x, piece))
    for learned, masked in ((True, True), (True, False), (False, True)):
        grad_flat, grad_raw = many._backward_many_triton(grads, flat, slope if learned else None, thresholds, masked)
        pieces = many._threshold_views(grad_raw, xs, thresholds) if learned else [None] * len(xs)
        for grad, out, one, start, piece in zip(grads, outs, slopes, starts, pieces, strict=True):
            grad_x, want = ops._backward_triton(grad, out, one if learned else None, masked)
            assert not learned or torch.equal(piece.reshape(want.shape), want)
            assert not masked or torch.equal(many._view(grad_flat, grad, start), grad_x)
        gaps = torch.ones(len(flat), dtype=torch.bool)
        for x, start in zip(xs, starts, strict=True):
            gaps[start : start + x.numel()] = False
        assert not flat[gaps].any()
        assert not masked or not grad_flat[gaps].any()


MANY = ((1, 1), (2, 1040), (0, 4), (3, 3, 3), (2, 16))


@pytest.mark.parametrize(("dtype", "raw_dtype"), DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_many(granularity, dtype, raw_dtype):
    check_many([example(shape, granularity, "sigmoid", dtype, raw_dtype) for shape in MANY])


@pytest.mark.parametrize("g", G)
def test_many_threshold_functions(g):
    check_many([example((5, 7), "row", g), example((3, 4, 5), "one", g), example((1, 1), "row", g)], g)


def test_many_share_and_repeat():
    (x, raw, grad), (other, _, other_grad) = example((5, 33)), example((2, 3))
    check_many([(x, raw, grad), (other, raw, other_grad), (x, raw, grad)])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_many_misaligned(granularity):
    """Addresses that are no multiple of 16 bytes, of x, of raw_threshold and of the gradient."""
    cases = []
    for shape in ((5, 33), (4, 16)):
        case = example(shape, granularity)
        cases.append(tuple(torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in case))
    assert any(tensor.data_ptr() % 16 for case in cases for tensor in case)
    check_many([*cases, example((3, 5), granularity)])


def test_the_tables():
    x = torch.zeros(3, 5)
    tables = many._Tables([x, torch.zeros(0, 2), x], [3, 1, 3])
    assert tables.addresses[[0, 2]].tolist() == [x.data_ptr()] * 2
    assert tables.layout[:12].tolist() == [5, 0, 0, 0, 0, 16, 3, 3, 5, 16, 3, 4]
    assert tables.owners.tolist() == [0] * 3 + [2] * 3
    assert tables.threshold_owners.tolist() == [0] * 3 + [1] + [2] * 3


def test_numbers_reach_the_device():
    """More than one launch takes, and as large as an address may be."""
    sent = (0, 1, 16, -1, 2**31, 2**56 + 5, *range(100))
    assert many._written(sent, torch.device("cpu"), 0)[: len(sent)].tolist() == list(sent)


@triton.jit
def place_kernel(p_cols, p_row, p_offsets, p_mask, block, BLOCK: tl.constexpr):
    row, offsets, mask = kernels._place(block, tl.load(p_cols), BLOCK)
    i = tl.arange(0, BLOCK)
    tl.store(p_row, row)
    tl.store(p_offsets + i, offsets)
    tl.store(p_mask + i, mask)


@pytest.mark.parametrize(
    ("cols", "block"),
    [(2**31 - 1, 2**21 - 1), (2**31 + 5, 2**21), (2**33, 2**23 - 1), (1025, 2**31 - 1), (1, 2**31 - 1)],
)
def test_offsets_beyond_two_to_the_31(cols, block):
    row, offsets = torch.empty(1, dtype=torch.int64), torch.empty(1024, dtype=torch.int64)
    mask = torch.empty(1024, dtype=torch.bool)
    place_kernel[(1,)](torch.tensor(cols), row, offsets, mask, block, BLOCK=1024)
    want_row, first = divmod(block, -(-cols // 1024))
    assert row.item() == want_row
    assert offsets.tolist() == [want_row * cols + first * 1024 + i for i in range(1024)]
    assert mask.tolist() == [first * 1024 + i < cols for i in range(1024)]
