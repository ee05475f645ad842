"""singular_value_threshold: against the formula, and where the formula's own autograd fails: equal and zero values."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from str_triton.ops.singular_value_threshold import _dot_precision, _tile, singular_value_threshold
from tests import oracle

FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "softplus": torch.nn.functional.softplus,
    "identity": lambda raw: raw.clamp(min=0),
}
SHAPES = [(1, 1), (6, 6), (9, 4), (4, 9), (1, 5), (5, 1), (3, 7, 5), (2, 3, 4, 6)]
# What rounding the result to the dtype costs, and the decomposition in float32 (float64 for float64).
TOLERANCE = {
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}
# Away from the threshold 1, at which the function has a kink.
SPECTRA = {
    "distinct": (5, 5, [4.0, 3.0, 2.0, 0.5, 0.2]),
    "equal survivors": (5, 5, [3.0, 3.0, 3.0, 0.5, 0.2]),
    "equal and pruned": (4, 4, [3.0, 0.5, 0.5, 0.5]),
    "zeros": (5, 5, [3.0, 2.0, 0.0, 0.0, 0.0]),
    "zero matrix": (3, 3, [0.0, 0.0, 0.0]),
    "all pruned": (3, 4, [0.5, 0.5, 0.1]),
    "identity": (4, 4, [2.0, 2.0, 2.0, 2.0]),
    "tall": (7, 4, [3.0, 3.0, 0.5, 0.0]),
    "wide": (4, 7, [3.0, 3.0, 0.5, 0.0]),
    "tall, all survive": (6, 3, [3.0, 2.0, 2.0]),
    "wide, all survive": (3, 6, [3.0, 2.0, 2.0]),
    "one element": (1, 1, [2.0]),
}


def matrix(m: int, n: int, spectrum: list[float]) -> Tensor:
    """A random m x n float64 matrix with these singular values."""
    u, _ = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    k = len(spectrum)
    return u[:, :k] @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ v[:, :k].mT


def gradients(w: Tensor, raw: Tensor, grad: Tensor, **options: str) -> tuple[Tensor, Tensor]:
    w, raw = w.detach().requires_grad_(), raw.detach().requires_grad_()
    return torch.autograd.grad(singular_value_threshold(w, raw, **options), (w, raw), grad)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, dtype):
    w = torch.randn(shape).to(dtype)
    for raw in (torch.tensor([[0.3]]), torch.randn(*shape[:-2], 1, 1)):
        out = singular_value_threshold(w, raw)
        expected = oracle.singular_value_threshold(w.double(), raw.double().exp().flatten(-2))
        assert out.dtype == dtype
        assert out.shape == w.shape
        torch.testing.assert_close(out, expected.to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("g", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_distinct_values(shape, g):
    w = torch.randn(shape, dtype=torch.float64)
    for raw in (torch.tensor([0.3]).double(), torch.randn(*shape[:-2], 1, 1, dtype=torch.float64)):
        grad = torch.randn_like(w)
        wo, ro = w.clone().requires_grad_(), raw.clone().requires_grad_()
        alpha = FUNCTIONS[g](ro)
        out = oracle.singular_value_threshold(wo, alpha.flatten(-2) if alpha.dim() > 1 else alpha)
        expected = torch.autograd.grad(out, (wo, ro), grad)
        torch.testing.assert_close(singular_value_threshold(w, raw, g=g), out.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients(w, raw, grad, g=g), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SPECTRA)
def test_gradcheck(name):
    w = matrix(*SPECTRA[name]).requires_grad_()
    raw = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(singular_value_threshold, (w, raw))


def test_gradcheck_of_a_batch_with_a_threshold_each():
    w = torch.stack([matrix(5, 4, [3.0, 3.0, 0.4, 0.0]), matrix(5, 4, [5.0, 0.2, 0.2, 0.1])]).requires_grad_()
    raw = torch.tensor([[[0.1]], [[0.7]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(singular_value_threshold, (w, raw))


@pytest.mark.parametrize("gap", [1e-4, 1e-7, 1e-10, 1e-13, 1e-16])
def test_gradient_at_nearly_equal_values_is_that_at_equal_ones(gap):
    # Near 2 + threshold s lies on either side of a power of two, where the last bits of this threshold are rounded
    # differently: s_i - s_j is not sigma_i - sigma_j.
    raw, grad = torch.tensor([0.25 + 5 * 2**-54], dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    torch.manual_seed(1)
    near = matrix(5, 4, [2.25 + gap / 2, 2.25 - gap / 2, 0.2 + gap, 0.2])
    torch.manual_seed(1)
    equal = matrix(5, 4, [2.25, 2.25, 0.2, 0.2])
    of_near, of_equal = (gradients(w, raw, grad, g="identity") for w in (near, equal))
    torch.testing.assert_close(of_near, of_equal, rtol=0, atol=10 * gap + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_does_not_grow_at_the_threshold(dtype):
    # The function is firmly nonexpansive, so no Jacobian, on whichever side of the kink, makes a gradient longer.
    eps = torch.finfo(dtype).eps
    for gap in (0.0, eps, 4 * eps, 100 * eps):
        w = matrix(6, 5, [1.0 + gap, 1.0 + gap, 1.0, 1.0 - gap, 1.0 - gap]).to(dtype)
        for raw in (0.0, gap, -gap):
            grad = torch.randn_like(w)
            grad_w, _ = gradients(w, torch.tensor([raw], dtype=dtype), grad)
            assert grad_w.norm() <= grad.norm() * (1 + 100 * eps)


def test_a_tie_counts_as_pruned():
    w, raw, grad = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.tensor([2.0]), torch.ones(3, 3)
    assert torch.equal(singular_value_threshold(w, raw, g="identity"), torch.diag(torch.tensor([1.0, 0.0, 0.0])))
    grad_w, grad_raw = gradients(w, raw, grad, g="identity")
    assert grad_raw.item() == -1
    torch.testing.assert_close(grad_w, torch.tensor([[1, 1, 0.5], [1, 0, 0], [0.5, 0, 0]]))


def test_a_threshold_of_zero_changes_nothing():
    w, grad = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    raw = torch.tensor([-1.0], dtype=torch.float64)
    torch.testing.assert_close(singular_value_threshold(w, raw, g="identity"), w)
    torch.testing.assert_close(gradients(w, raw, grad, g="identity")[0], grad)


def test_gradient_does_not_depend_on_the_choice_of_singular_vectors():
    w = matrix(5, 4, [3.0, 3.0, 0.0, 0.0])[None]
    raw, grad = torch.zeros(1, dtype=torch.float64), torch.randn_like(w)
    _, u, sigma, vh, s = torch.ops.str_triton.singular_value_threshold(w, raw, "exp")
    expected = torch.ops.str_triton.singular_value_threshold_backward(grad, u, sigma, vh, s, raw, "exp")
    turns = [torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0] for _ in range(3)]
    # One rotation for both sides where sigma is not zero, one for each side where it is.
    u = u @ torch.block_diag(turns[0], turns[1])
    vh = torch.block_diag(turns[0], turns[2]).mT @ vh
    turned = torch.ops.str_triton.singular_value_threshold_backward(grad, u, sigma, vh, s, raw, "exp")
    torch.testing.assert_close(turned, expected)


def test_transpose():
    w, grad = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    raw = torch.zeros(3, 1, 1, dtype=torch.float64)
    out = singular_value_threshold(w.mT, raw)
    assert out.is_contiguous()
    torch.testing.assert_close(out, singular_value_threshold(w, raw).mT)
    expected_w, expected_raw = gradients(w, raw, grad)
    torch.testing.assert_close(gradients(w.mT, raw, grad.mT), (expected_w.mT, expected_raw))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 4, 4), (0, 1, 4), (0, 2, 3, 3)], ids=str)
def test_empty(shape):
    w = torch.randn(shape, requires_grad=True)
    for raw in (torch.zeros(()), torch.zeros(*shape[:-2], 1, 1)):
        raw.requires_grad_()
        out = singular_value_threshold(w, raw)
        grad_w, grad_raw = torch.autograd.grad(out.sum(), (w, raw))
        assert out.shape == grad_w.shape == w.shape
        assert torch.equal(grad_raw, torch.zeros_like(raw))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_becomes_nan_and_leaves_the_others_alone(bad):
    w, raw = torch.randn(3, 4, 3), torch.zeros(3, 1, 1)
    clean = singular_value_threshold(w, raw)
    grad = torch.randn_like(w)
    clean_w, clean_raw = gradients(w, raw, grad)
    w[1, 2, 0] = bad
    out = singular_value_threshold(w, raw)
    grad_w, grad_raw = gradients(w, raw, grad)
    assert out[1].isnan().all()
    assert grad_w[1].isnan().all()
    for i in (0, 2):
        assert torch.equal(out[i], clean[i])
        assert torch.equal(grad_w[i], clean_w[i])
        assert torch.equal(grad_raw[i], clean_raw[i])


def test_a_threshold_of_nan_gives_nan_and_one_of_inf_zero():
    w = torch.randn(2, 3, 3)
    out = singular_value_threshold(w, torch.tensor([float("nan"), float("inf")]).reshape(2, 1, 1))
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.zeros(3, 3))


def test_autocast_changes_no_bit():
    w, raw, grad = torch.randn(8, 6), torch.zeros(1), torch.randn(8, 6)
    out, expected = singular_value_threshold(w, raw), gradients(w, raw, grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(singular_value_threshold(w, raw), out)
        assert all(map(torch.equal, gradients(w, raw, grad), expected))


def test_same_inputs_same_bits():
    w, raw, grad = torch.randn(3, 40, 30), torch.zeros(3, 1, 1), torch.randn(3, 40, 30)
    assert torch.equal(singular_value_threshold(w, raw), singular_value_threshold(w, raw))
    assert all(map(torch.equal, gradients(w, raw, grad), gradients(w, raw, grad)))


def test_saves_the_decomposition_and_nothing_else():
    sizes = []
    w, raw = torch.randn(2, 7, 5, requires_grad=True), torch.zeros(1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        singular_value_threshold(w, raw)
    assert sum(sizes) == 2 * (7 * 5 + 5 * 5 + 5 + 5) + 1


def test_second_derivative_is_refused():
    w = torch.randn(3, 3, requires_grad=True)
    loss = singular_value_threshold(w, torch.zeros(1)).square().sum()
    (grad_w,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_w.sum().backward()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 4, 4), torch.float32), ((3, 5, 4), torch.float16), ((3, 4, 5), torch.float64), ((2, 1, 1), torch.bfloat16)],
    ids=str,
)
def test_opcheck(shape, dtype):
    ops = torch.ops.str_triton
    w, raw = torch.randn(shape).to(dtype), torch.zeros(shape[0], 1)
    torch.library.opcheck(ops.singular_value_threshold.default, (w, raw, "exp"))
    out, *saved = ops.singular_value_threshold(w, raw, "exp")
    arguments = (torch.randn_like(out), *saved, raw, "exp")
    torch.library.opcheck(ops.singular_value_threshold_backward.default, arguments)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 6)], ids=str)
def test_compile(shape):
    w, raw, grad = torch.randn(shape), torch.zeros(*shape[:-2], 1, 1), torch.randn(shape)
    compiled = torch.compile(singular_value_threshold, fullgraph=True, backend="aot_eager")
    wc, rc = w.clone().requires_grad_(), raw.clone().requires_grad_()
    out = compiled(wc, rc)
    assert torch.equal(out, singular_value_threshold(w, raw))
    assert all(map(torch.equal, torch.autograd.grad(out, (wc, rc), grad), gradients(w, raw, grad)))


@pytest.mark.parametrize("raw_shape", [(1,), (2, 1, 1)], ids=str)
def test_torch_func(raw_shape):
    """`grad`, and `vmap` of it over weights and over the gradient alone."""
    w, raw, grad = torch.randn(3, 2, 5, 4), torch.zeros(3, *raw_shape), torch.randn(3, 2, 5, 4)
    both = torch.func.grad(lambda w, raw, grad: (singular_value_threshold(w, raw) * grad).sum(), (0, 1))
    want = [gradients(*sample) for sample in zip(w, raw, grad, strict=True)]
    torch.testing.assert_close(both(w[0], raw[0], grad[0]), want[0])
    torch.testing.assert_close(torch.func.vmap(both)(w, raw, grad), tuple(map(torch.stack, zip(*want, strict=True))))
    per_sample = torch.func.vmap(both, in_dims=(None, None, 0))(w[0], raw[0], grad)
    want = [gradients(w[0], raw[0], sample) for sample in grad]
    torch.testing.assert_close(per_sample, tuple(map(torch.stack, zip(*want, strict=True))))


@pytest.mark.parametrize(
    ("w", "raw", "options", "error", "message"),
    [
        (torch.ones(3), torch.ones(1), {}, ValueError, r"w .*matrix .*\(3,\)"),
        (torch.ones(3, 3).int(), torch.ones(1), {}, TypeError, "w .*tensor of .* torch.int32"),
        (torch.ones(3, 3), 0.5, {}, TypeError, "raw_threshold .*tensor of .* float"),
        (torch.ones(3, 3), torch.ones(1), {"g": "tanh"}, ValueError, "g .*'sigmoid', .* 'tanh'"),
        (torch.ones(3, 3), torch.ones(1, device="meta"), {}, ValueError, "raw_threshold .*meta.* w .*cpu"),
        (torch.ones(5, 2, 3), torch.ones(2, 1, 1), {}, ValueError, r"\(2, 1, 1\) .* \(5, 2, 3\): .* shape \(5, 1, 1\)"),
        (torch.ones(5, 2, 3), torch.ones(5), {}, ValueError, r"one element.* \(5, 1, 1\)"),
    ],
)
def test_errors(w, raw, options, error, message):
    with pytest.raises(error, match=message):
        singular_value_threshold(w, raw, **options)


@pytest.mark.parametrize(
    ("m", "n", "dtype", "tile"),
    [(1, 16, torch.float32, (16, 16, 16)), (17, 33, torch.float32, (32, 64, 16)), (9, 33, torch.float64, (16, 32, 16))],
)
def test_a_tile_holds_the_matrix_up_to_a_limit(m, n, dtype, tile):
    assert _tile(m, n, dtype) == tile


@pytest.mark.parametrize("hip", [None, "7.0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("torchs", ["tf32", "ieee"])
def test_products_are_in_tf32_where_torchs_are(torchs, dtype, hip, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=torchs))
    monkeypatch.setattr(torch.version, "hip", hip)
    expected = "tf32" if (torchs, dtype, hip) == ("tf32", torch.float32, None) else "ieee"
    assert _dot_precision(dtype) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 70), (70, 130), (0, 3, 3), (3, 0)], ids=str)
def test_gpu(shape, dtype):
    w, raw, grad = torch.randn(shape).to(dtype), torch.randn(*shape[:-2], 1, 1), torch.randn(shape).to(dtype)
    tolerance = {"rtol": max(TOLERANCE[dtype]["rtol"], 1e-4), "atol": max(TOLERANCE[dtype]["rtol"], 1e-4)}
    if dtype == torch.float64:
        raw, tolerance = raw.double(), {"rtol": 1e-9, "atol": 1e-9}
    out = singular_value_threshold(w.cuda(), raw.cuda())
    torch.testing.assert_close(out.cpu(), singular_value_threshold(w, raw), **tolerance)
    on_gpu = [x.cpu() for x in gradients(w.cuda(), raw.cuda(), grad.cuda())]
    torch.testing.assert_close(on_gpu, list(gradients(w, raw, grad)), **tolerance)


@pytest.mark.gpu
def test_gpu_opcheck_nan_and_bits():
    w, raw = torch.randn(3, 70, 40, device="cuda"), torch.zeros(3, 1, device="cuda")
    torch.library.opcheck(torch.ops.str_triton.singular_value_threshold.default, (w, raw, "exp"))
    raw = raw[:, None]
    clean = singular_value_threshold(w, raw)
    assert torch.equal(singular_value_threshold(w, raw), clean)
    w[1, 2, 3] = torch.nan
    out = singular_value_threshold(w, raw)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[::2], clean[::2])
