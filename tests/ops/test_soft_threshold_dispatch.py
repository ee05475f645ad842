"""soft_threshold and soft_threshold_many through PyTorch's dispatcher: opcheck, torch.compile, fakes, and errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from str_triton import soft_threshold, soft_threshold_many
from str_triton.ops.soft_threshold import BLOCK, _blocks, _rows
from tests.ops.soft_threshold_cases import GRADIENTS, G, assert_matches, differentiate, example

OPS = torch.ops.str_triton


@pytest.fixture(autouse=True)
def _no_compiled_code_left_over():
    torch.compiler.reset()


@pytest.mark.parametrize("granularity", ["one_of_the_paper", "row", "weight"])
def test_opcheck(granularity):
    x, raw, grad = example((4, 3, 3), granularity)
    other = x.new_ones(()) if granularity != "weight" else torch.ones(3)
    xs, raws, grads = [x, torch.randn(3)], [raw, other], [grad, torch.randn(3)]
    torch.library.opcheck(OPS.soft_threshold, (x, raw, "sigmoid"))
    out = OPS.soft_threshold(x, raw, "sigmoid")
    torch.library.opcheck(OPS.soft_threshold_many, (xs, raws, "sigmoid"))
    flat = OPS.soft_threshold_many(xs, raws, "sigmoid")
    for masked in (True, False):
        torch.library.opcheck(OPS.soft_threshold_backward, (grad, out, raw, "sigmoid", masked))
        torch.library.opcheck(OPS.soft_threshold_many_backward, (grads, flat, raws, "sigmoid", masked))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("granularity", ["one_of_the_paper", "row", "weight"])
def test_compiled_in_one_graph(granularity, gradient):
    compiled = torch.compile(soft_threshold, fullgraph=True, backend="aot_eager", dynamic=False)
    case = example((4, 3, 3), granularity, "softplus")
    eager, traced = (differentiate(f, case, g="softplus", gradient=gradient) for f in (soft_threshold, compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_compiled_with_sizes_that_change():
    compiled = torch.compile(soft_threshold, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7, 33):
        case = example((rows, 6), "row")
        assert_matches(differentiate(compiled, case), case, "sigmoid", "masked")


def test_many_compiled_in_one_graph():
    compiled = torch.compile(soft_threshold_many, fullgraph=True, backend="aot_eager")
    shared = torch.tensor(0.3, requires_grad=True)
    xs = [torch.randn(shape, requires_grad=True) for shape in ((3, 4), (5,), (2, 1, 3))]
    results = []
    for many in (soft_threshold_many, compiled):
        outs = many(xs, [shared] * 3)
        results.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), [*xs, shared])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_no_storage_is_touched(device):
    """Shapes, dtypes and layouts follow without data, also where there are more than 2^31 elements."""
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x = torch.empty(2**12, 2**10, 2**5, 2**5, dtype=torch.bfloat16, requires_grad=True)
        x = x.contiguous(memory_format=torch.channels_last)
        raw = torch.empty(2**12, 1, 1, 1, requires_grad=True)
        out = soft_threshold(x, raw)
        assert (out.shape, out.dtype, out.stride()) == (x.shape, x.dtype, x.stride())
        grad_x, grad_raw = torch.autograd.grad(out, (x, raw), torch.empty_like(out))
        assert (grad_x.shape, grad_x.dtype) == (x.shape, x.dtype)
        assert (grad_raw.shape, grad_raw.dtype) == (raw.shape, raw.dtype)
        many = soft_threshold_many([x, x], [raw, raw])
        assert [tensor.shape for tensor in many] == [x.shape] * 2


def test_the_grid_of_a_large_tensor_fits():
    x, raw = torch.empty(2**20, 2**19, device="meta"), torch.empty(2**20, 1, device="meta")
    rows, cols, _ = _rows(x, raw)
    assert 2**39 / BLOCK <= rows * _blocks(cols) < 2**31


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_it_alone(dtype):
    case = example((5, 7))
    with torch.autocast("cpu", dtype=dtype):
        result = differentiate(soft_threshold, case)
        (many,) = soft_threshold_many([case.x], [case.raw])
    assert_matches(result, case, "sigmoid", "masked")
    assert torch.equal(many, result.out)


def test_a_weight_that_is_a_parameter_of_a_module():
    """The gradient of the paper's [1, 1] threshold has its shape, as the optimizer needs it."""
    weight, raw = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.zeros(1, 1))
    torch.nn.functional.linear(torch.randn(2, 4), soft_threshold(weight, raw)).sum().backward()
    assert raw.grad.shape == (1, 1)
    assert weight.grad.shape == (6, 4)


X, RAW = torch.zeros(3, 4, 5), torch.zeros(())
ERRORS = [
    ((X, RAW), {"g": "tanh"}, ValueError, r"g must be one of 'sigmoid', 'exp', 'softplus', 'identity', got 'tanh'"),
    ((X, RAW), {"gradient": "hard"}, ValueError, r"gradient must be 'masked' or 'straight_through', got 'hard'"),
    ((X.int(), RAW), {}, TypeError, r"x must be a tensor of float16, .* or float64, got torch\.int32"),
    ((X.cfloat(), RAW), {}, TypeError, r"x must be .*, got torch\.complex64"),
    ((X.to(torch.float8_e4m3fn), RAW), {}, TypeError, r"x must be .*, got torch\.float8_e4m3fn"),
    ((X, 0.1), {}, TypeError, r"raw_threshold must be a tensor of .*, got float"),
    ((X, RAW.to("meta")), {}, ValueError, r"raw_threshold is on meta, x on cpu: move them to one device"),
    (
        (X, torch.zeros(3, 4, 1)),
        {},
        ValueError,
        r"raw_threshold of shape \(3, 4, 1\) does not fit x of shape \(3, 4, 5\): give one element, "
        r"\(3, 1, 1\) for one per row, or x's shape for one per weight",
    ),
    ((X, torch.zeros(3)), {}, ValueError, r"raw_threshold of shape \(3,\) does not fit"),
    ((X, torch.zeros(0)), {}, ValueError, r"raw_threshold of shape \(0,\) does not fit"),
    ((torch.zeros(()), torch.zeros(2)), {}, ValueError, r"raw_threshold of shape \(2,\) does not fit x of shape \(\)"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_errors(arguments, options, error, message):
    x, raw = arguments
    with pytest.raises(error, match=message):
        soft_threshold(x, raw, **options)
    with pytest.raises(error, match=message):
        soft_threshold_many([x], [raw], **options)


MANY_ERRORS = [
    ([X], [RAW, RAW], r"xs and raw_thresholds must be of the same length, got 1 and 2"),
    ([X, X.double()], [RAW, RAW], r"xs must share one dtype and one device, got .*float32.*float64"),
    ([X, X], [RAW, RAW.half()], r"raw_thresholds must share one dtype and one device, got .*float16.*float32"),
    ([X, X.to("meta")], [RAW, RAW.to("meta")], r"xs must share one dtype and one device, got .*cpu.*meta"),
    ([X, X], [RAW, X], r"raw_thresholds must be one per weight for all of xs or for none of them"),
    ([torch.zeros(0), X], [RAW, X], r"raw_thresholds must be one per weight for all of xs or for none of them"),
]


@pytest.mark.parametrize(("xs", "raws", "message"), MANY_ERRORS)
def test_errors_of_lists(xs, raws, message):
    with pytest.raises(ValueError, match=message):
        soft_threshold_many(xs, raws)


def test_threshold_functions_and_their_inverses():
    from str_triton.ops.thresholds import THRESHOLD_FUNCTIONS

    alpha = torch.tensor([1e-6, 0.01, 0.5, 0.999], dtype=torch.float64)
    for g, functions in THRESHOLD_FUNCTIONS.items():
        raw = functions.inverse(alpha)
        torch.testing.assert_close(functions.value(raw), alpha, rtol=1e-9, atol=0)
        raw.requires_grad_()
        (derivative,) = torch.autograd.grad(functions.value(raw).sum(), raw)
        torch.testing.assert_close(functions.derivative(raw.detach()), derivative)
        lowest = functions.value(functions.inverse(torch.tensor(0.0)))
        assert lowest == 0, g
    assert THRESHOLD_FUNCTIONS["sigmoid"].inverse(torch.tensor(3.0)) == torch.inf
    assert set(THRESHOLD_FUNCTIONS) == set(G)
