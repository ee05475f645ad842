"""soft_threshold and soft_threshold_many through PyTorch's dispatcher: opcheck, torch.compile, fakes, and errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from str_triton import soft_threshold, soft_threshold_many
from str_triton.ops.layout import BLOCK, _blocks, _rows
from str_triton.ops.thresholds import THRESHOLD_FUNCTIONS
from tests.ops.soft_threshold_cases import GRADIENTS, G, assert_matches, differentiate, example

OPS = torch.ops.str_triton


@pytest.fixture(autouse=True)
def _no_compiled_code_left_over():
    torch.compiler.reset()


@pytest.mark.parametrize("granularity", ["one_of_the_paper", "row", "weight"])
def test_opcheck(granularity):
    x, raw, grad = example((4, 3, 3), granularity)
    alpha = THRESHOLD_FUNCTIONS["sigmoid"].value(raw)
    xs, grads, thresholds = [x, torch.randn(3)], [grad, torch.randn(3)], [raw.numel(), 3 if raw.numel() > 4 else 1]
    joined = torch.rand(48 + 16 if raw.numel() > 4 else sum(thresholds))
    torch.library.opcheck(OPS.soft_threshold, (x, alpha))
    out = OPS.soft_threshold(x, alpha)
    torch.library.opcheck(OPS.soft_threshold_many, (xs, joined, thresholds))
    flat = OPS.soft_threshold_many(xs, joined, thresholds)
    for learned, masked in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPS.soft_threshold_backward, (grad, out, alpha if learned else None, masked))
        arguments = (grads, flat, joined if learned else None, thresholds, masked)
        torch.library.opcheck(OPS.soft_threshold_many_backward, arguments)


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


def test_a_convolution_of_one_by_one_is_not_copied(monkeypatch):
    """In channels_last its strides differ from contiguous ones, its place in memory does not."""
    x, raw, grad = example((8, 6, 1, 1))
    x = torch.empty_strided(x.shape, (6, 1, 6, 6)).copy_(x)  # As nn.Module.to(memory_format=...) makes them.
    seen = []
    for name in ("soft_threshold", "soft_threshold_many"):
        op = getattr(OPS, f"{name}_backward")

        def record(grads, *others, op=op):
            seen.extend(grads if isinstance(grads, list) else [grads])
            return op(grads, *others)

        monkeypatch.setattr(OPS, f"{name}_backward", record)
    leaf = x.requires_grad_()
    torch.autograd.grad([soft_threshold(leaf, raw), *soft_threshold_many([leaf], [raw])], leaf, [grad, grad])
    assert [tensor.data_ptr() for tensor in seen] == [grad.data_ptr()] * 2


@pytest.mark.parametrize("many", [False, True])
def test_a_frozen_threshold_is_not_differentiated(many, monkeypatch):
    x, raw, grad = example((4, 3))
    slopes, name = [], "soft_threshold_many_backward" if many else "soft_threshold_backward"
    op = getattr(OPS, name)

    def record(*arguments):
        slopes.append(arguments[2])
        return op(*arguments)

    monkeypatch.setattr(OPS, name, record)
    outs = soft_threshold_many([x.requires_grad_()], [raw]) if many else [soft_threshold(x.requires_grad_(), raw)]
    (grad_x,) = torch.autograd.grad(outs, x, [grad])
    assert slopes == [None]
    assert torch.equal(grad_x, torch.where(outs[0] != 0, grad, 0))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("granularity", ["one_of_the_paper", "row", "weight"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_torch_func(layout, granularity, gradient):
    """`grad`, `vmap` of it over inputs (gradients per sample), over weights (ensembles), and `grad` of `vmap`."""
    cases = [example((4, 3, 2, 2), granularity) for _ in range(3)]
    x, raw, grad = (torch.stack(kind) for kind in zip(*cases, strict=True))
    x = x.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, (3, 4))

    def one(x, raw, grad):
        return (soft_threshold(x, raw, gradient=gradient) * grad).sum()

    def many(x, raw, grad):
        outs = soft_threshold_many([x, 2 * x], [raw, raw], gradient=gradient)
        return (outs[0] * grad).sum() + outs[1].square().sum()

    for function in (one, many):
        want = []
        for sample in zip(x, raw, grad, strict=True):
            leaves = [tensor.detach().requires_grad_() for tensor in sample[:2]]
            want.append(torch.autograd.grad(function(*leaves, sample[2]), leaves))
        both = torch.func.grad(function, (0, 1))
        torch.testing.assert_close(both(x[0], raw[0], grad[0]), want[0])
        ensemble = torch.func.vmap(both)(x, raw, grad)
        of_sum = torch.func.grad(lambda x, raw, f=function: torch.func.vmap(f)(x, raw, grad).sum(), (0, 1))(x, raw)
        for got in (ensemble, of_sum):
            torch.testing.assert_close(got, tuple(torch.stack(kind) for kind in zip(*want, strict=True)))
        per_sample = torch.func.vmap(both, in_dims=(None, None, 0))(x[0], raw[0], grad)
        for i in range(3):
            torch.testing.assert_close([part[i] for part in per_sample], list(both(x[0], raw[0], grad[i])))


def test_the_grid_of_a_large_tensor_fits():
    x, raw = torch.empty(2**20, 2**19, device="meta"), torch.empty(2**20, 1, device="meta")
    rows, cols, _ = _rows(x, raw.numel())
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


@pytest.mark.parametrize("g", G)
def test_a_threshold_has_the_same_bits_wherever_it_stands(g):
    """In a list or alone, and as float64 rounds it: so do another device and compiled code."""
    value, derivative, _ = THRESHOLD_FUNCTIONS[g]
    raw = 3 * torch.randn(1001)
    for function in (value, derivative):
        together = function(raw)
        assert torch.equal(together, torch.stack([function(element) for element in raw]))
        assert torch.equal(together, function(raw.double()).float())


@pytest.mark.parametrize("g", G)
def test_threshold_functions_far_out(g):
    """Finite derivatives, by formula and by autograd, at 0 and where g under- or overflows."""
    value, derivative, _ = THRESHOLD_FUNCTIONS[g]
    raw = torch.tensor([-3200.0, -745.0, -0.0, 0.0, 50.0], requires_grad=True)
    (grad,) = torch.autograd.grad(value(raw).sum(), raw)
    torch.testing.assert_close(grad, derivative(raw.detach()))
    assert value(torch.tensor(-torch.inf)) == 0
    assert value(torch.tensor(torch.nan)).isnan()


def test_threshold_functions_and_their_inverses():
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
