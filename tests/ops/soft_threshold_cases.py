"""The cases of soft_threshold that the CPU, GPU and interpreter tests share, and how results are compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tests import oracle

G = ("sigmoid", "exp", "softplus", "identity")
GRADIENTS = ("masked", "straight_through")
GRANULARITIES = ("one", "one_of_the_paper", "row", "weight")
# Both sides of the kernels' block of 1,024 elements, rows that are and are not multiples of 16, and nothing at all.
SHAPES = (
    (), (0,), (1,), (1023,), (1024,), (1025,),
    (2, 0, 3), (0, 4), (3, 341), (2, 1040), (3, 1025), (5, 3, 3, 3), (16, 8, 3, 3),
)  # fmt: skip
# Relative error by dtype. The 16-bit ones are computed in float32 and lose their last bit, rounded.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Those of x and of raw_threshold.
DTYPES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
)
# About half of a standard normal survives these.
CENTER = {"sigmoid": 0.7, "exp": -0.4, "softplus": -0.1, "identity": 0.67}


class Case(NamedTuple):
    """x, its raw threshold, and the gradient of the output."""

    x: Tensor
    raw: Tensor
    grad: Tensor


class Result(NamedTuple):
    """S, dL/dx and dL/ds."""

    out: Tensor
    grad_x: Tensor
    grad_raw: Tensor


def fits(shape: tuple[int, ...], granularity: str) -> bool:
    return granularity != "row" or len(shape) > 1


def example(
    shape: tuple[int, ...],
    granularity: str = "one",
    g: str = "sigmoid",
    dtype: torch.dtype = torch.float32,
    raw_dtype: torch.dtype | None = None,
) -> Case:
    """Random, but for weights so near the threshold that its last bit decides whether they are pruned."""
    raw_shape = {
        "one": (),
        "one_of_the_paper": (1, 1),
        "row": (*shape[:1], *[1] * (len(shape) - 1)),
        "weight": shape,
    }[granularity]
    raw = (CENTER[g] + 0.3 * torch.randn(raw_shape)).to(raw_dtype or dtype)
    x = torch.randn(shape).to(dtype)
    alpha = oracle.threshold(raw.reshape(()) if raw.numel() == 1 else raw, g)
    x = torch.where((x.abs() - alpha).abs() < 1e-5, x + 2**-5, x)
    return Case(x, raw, torch.randn(shape).to(dtype))


def differentiate(function, case: Case, **options: str) -> Result:
    """Return the function's value and gradients. The case's layouts are kept."""
    x, raw = case.x.detach().requires_grad_(), case.raw.detach().requires_grad_()
    out = function(x, raw, **options)
    return Result(out.detach(), *torch.autograd.grad(out, (x, raw), case.grad))


def expected(case: Case, g: str, gradient: str) -> Result:
    """Return the result of the paper's formula in float64."""
    formula = oracle.soft_threshold if gradient == "masked" else oracle.soft_threshold_straight_through
    return differentiate(formula, Case(*(tensor.cpu().double() for tensor in case)), g=g)


def assert_matches(result: Result, case: Case, g: str, gradient: str) -> None:
    """Value and gradients are the formula's to within the tolerance of their dtype; shapes and dtypes are right."""
    x, raw, grad = case
    for got, like in zip(result, (x, x, raw), strict=True):
        assert (got.shape, got.dtype, got.device) == (like.shape, like.dtype, like.device)
    out, grad_x, grad_raw = (tensor.cpu().double() for tensor in result)
    want = expected(case, g, gradient)
    compute = TOLERANCE[torch.promote_types(torch.promote_types(x.dtype, raw.dtype), torch.float32)]
    # |x| - alpha cancels, so the error of alpha stands beside that of the last rounding.
    torch.testing.assert_close(out, want.out, rtol=TOLERANCE[x.dtype], atol=compute)
    torch.testing.assert_close(grad_x, want.grad_x, rtol=0, atol=0)
    # The error of a sum is relative to the sum of the magnitudes.
    magnitudes = grad.cpu().double().abs()
    if raw.numel() == 1:
        magnitudes = magnitudes.sum().reshape(raw.shape)
    elif raw.shape != x.shape:
        magnitudes = magnitudes.flatten(1).sum(1).reshape(raw.shape)
    error = (grad_raw - want.grad_raw).abs()
    subnormal = torch.finfo(raw.dtype).smallest_normal * torch.finfo(raw.dtype).eps
    bound = TOLERANCE[raw.dtype] * want.grad_raw.abs() + compute * magnitudes + subnormal
    assert (error <= bound).all(), (error - bound).max()


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fresh memory is NaN, so that an element that nobody writes shows."""
    settings = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(settings[0])
        torch.utils.deterministic.fill_uninitialized_memory = settings[1]
