"""Oracle 5: the kernels on a GPU, against the formula in float64 and, for a list, against a loop bit for bit."""

from itertools import product

import pytest
import torch
from torch import Tensor

from str_triton import soft_threshold, soft_threshold_many
from str_triton.ops.thresholds import THRESHOLD_FUNCTIONS
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

pytestmark = pytest.mark.gpu
INF, NAN = float("inf"), float("nan")
LARGE = ((64, 3, 7, 7), (512, 512, 3, 3), (1000, 2048), (7, 3, 1023), (2049, 1025))


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


def on_gpu(case: Case) -> Case:
    return Case(*(tensor.cuda() for tensor in case))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize(("shape", "granularity"), [c for c in product(SHAPES, GRANULARITIES) if fits(*c)])
def test_value_and_gradients(shape, granularity, g, gradient):
    case = on_gpu(example(shape, granularity, g))
    assert_matches(differentiate(soft_threshold, case, g=g, gradient=gradient), case, g, gradient)


@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
@pytest.mark.parametrize("shape", LARGE)
def test_large(shape, granularity):
    for gradient in GRADIENTS:
        case = on_gpu(example(shape, granularity))
        assert_matches(differentiate(soft_threshold, case, gradient=gradient), case, "sigmoid", gradient)


@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
@pytest.mark.parametrize(("dtype", "raw_dtype"), DTYPES)
def test_dtypes(dtype, raw_dtype, granularity):
    for g, gradient in product(G, GRADIENTS):
        case = on_gpu(example((6, 3456), granularity, g, dtype, raw_dtype))
        assert_matches(differentiate(soft_threshold, case, g=g, gradient=gradient), case, g, gradient)


def layouts(x: Tensor) -> list[Tensor]:
    return [
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.empty(8, 12, 4, 8, device=x.device)[:, ::2, :, ::2].copy_(x),
        torch.empty(x.numel() + 1, device=x.device)[1:].view(x.shape).copy_(x),
    ]


@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
def test_layouts(granularity):
    x, raw, grad = on_gpu(example((8, 6, 4, 4), granularity))
    grads = [*layouts(grad), torch.ones((), device="cuda").expand(grad.shape)]
    for case in (Case(x_laid_out, raw, grad_laid_out) for x_laid_out, grad_laid_out in product(layouts(x), grads)):
        assert_matches(differentiate(soft_threshold, case), case, "sigmoid", "masked")


@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize("granularity", ["row", "weight"])
def test_special_values(granularity, g):
    """NaN, infinities, ties, thresholds that under- and overflow: what the CPU gives."""
    specials = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 0.5, -0.5, 50.0, -200.0, 200.0])
    x, raw = specials.repeat(10, 1), specials.unsqueeze(1)
    raw = raw if granularity == "row" else raw.repeat(1, 10)
    torch.testing.assert_close(
        soft_threshold(x.cuda(), raw.cuda(), g=g).cpu(), soft_threshold(x, raw, g=g), equal_nan=True
    )


@pytest.mark.parametrize("g", G)
@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
def test_the_weights_that_survive_on_the_cpu(granularity, g):
    """Bit for bit, of weights at the threshold and the next numbers on either side."""
    raw = {"one": torch.full((1,), 0.3), "row": torch.randn(1000, 1), "weight": torch.randn(1000, 33)}[granularity]
    at = THRESHOLD_FUNCTIONS[g].value(raw).expand(1000, 33)
    x = torch.stack([torch.nextafter(at, torch.tensor(end)) for end in (-INF, INF)] + [at])
    x = x.gather(0, torch.randint(3, (1, 1000, 33)))[0]
    assert torch.equal(soft_threshold(x.cuda(), raw.cuda(), g=g).cpu(), soft_threshold(x, raw, g=g))


def test_many_in_a_cuda_graph():
    """Nothing is copied from the host: the graph writes its own tables, also for lists that it has not met before."""
    xs = [torch.randn(65, 33 + i, device="cuda") for i in range(3)]
    ops, alpha = torch.ops.str_triton, torch.full((3,), 0.5, device="cuda")
    ops.soft_threshold_many([x.clone() for x in xs], alpha, [1] * 3)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flat = ops.soft_threshold_many(xs, alpha, [1] * 3)
    for x in xs:
        x.mul_(2)
    graph.replay()
    assert torch.equal(flat, ops.soft_threshold_many(xs, alpha, [1] * 3))


def assert_same_bits(cases: list[Case], gradient: str) -> None:
    leaves = [tensor.detach().requires_grad_() for case in cases for tensor in case[:2]]
    xs, raws, grads = leaves[::2], leaves[1::2], [case.grad for case in cases]
    loop = [soft_threshold(x, raw, gradient=gradient) for x, raw in zip(xs, raws, strict=True)]
    many = soft_threshold_many(xs, raws, gradient=gradient)
    assert all(torch.equal(a, b) for a, b in zip(loop, many, strict=True))
    grads = [torch.autograd.grad(outs, leaves, grads) for outs in (loop, many)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("granularity", ["one", "row", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_has_the_bits_of_a_loop(dtype, granularity, gradient):
    shapes = (*LARGE, (5, 3, 3, 3), (0, 4), (1, 1))
    assert_same_bits([on_gpu(example(shape, granularity, dtype=dtype)) for shape in shapes], gradient)


@pytest.mark.parametrize("granularity", ["one", "row"])
def test_many_has_the_bits_of_a_loop_whatever_the_alignment_of_a_gradient(granularity):
    cases = [on_gpu(example(shape, granularity)) for shape in LARGE[:3]]
    misaligned = torch.empty(cases[0].grad.numel() + 1, device="cuda")[1:].view(LARGE[0])
    aligned = cases[0]
    cases[0] = aligned._replace(grad=misaligned.copy_(aligned.grad))
    assert_same_bits(cases, "masked")
    for a, b in zip(differentiate(soft_threshold, aligned), differentiate(soft_threshold, cases[0]), strict=True):
        assert torch.equal(a, b)


def test_the_same_inputs_give_the_same_bits():
    case = on_gpu(example((512, 512, 3, 3)))
    first, second = (differentiate(soft_threshold, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_many_on_another_stream():
    """Each stream has tables of its own: one that is still being copied on another would give anything."""
    cases = [on_gpu(example((64, 65 + i))) for i in range(50)]
    xs, raws, _ = (list(kind) for kind in zip(*cases, strict=True))
    want = [soft_threshold(x, raw) for x, raw in zip(xs, raws, strict=True)]
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            got = soft_threshold_many(xs, raws)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compiled_in_one_graph(gradient):
    torch.compiler.reset()
    case = on_gpu(example((64, 33), "row"))
    eager = differentiate(soft_threshold, case, gradient=gradient)
    compiled = differentiate(torch.compile(soft_threshold, fullgraph=True), case, gradient=gradient)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_it_alone(dtype):
    case = on_gpu(Case(torch.tensor([1e-11, -1.0, 2e-11]), torch.tensor([[-25.0]]), torch.ones(3)))
    with torch.autocast("cuda", dtype=dtype):
        result = differentiate(soft_threshold, case)
    assert_matches(result, case, "sigmoid", "masked")
    assert result.out[2] > 0


def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 2048 + 5
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    where = torch.tensor([0, 5, 2**31 - 1, 2**31, numel - 1], device="cuda")
    x[where] = torch.tensor([2.0, -2.0, 3.0, -3.0, 4.0], dtype=x.dtype, device="cuda")
    raw = torch.tensor([[1.0]], device="cuda")
    out, grad_x, grad_raw = differentiate(soft_threshold, Case(x, raw, torch.ones_like(x)), g="identity")
    assert out[where].tolist() == [1, -1, 2, -2, 3]
    assert int((out != 0).sum()) == 5
    assert int((grad_x != 0).sum()) == 5
    assert grad_raw.item() == -1
