"""LowRankWeight and LowRankLinear: the formula, what the threshold cuts, conversions."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from str_triton import LowRankLayer, LowRankLinear, LowRankWeight

G = {"exp": torch.exp, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus, "identity": torch.relu}


def literal(matrix: LowRankWeight) -> Tensor:
    """The paper's (W1 * S(m)) W2 with the threshold on the size of a component."""
    u, m, v, alpha = matrix.u, matrix.m, matrix.v, G[matrix.g](matrix.raw_threshold)
    product = torch.zeros(matrix.shape, dtype=u.dtype)
    for k in range(matrix.max_rank):
        size = m[k].abs() * u[:, k].norm() * v[:, k].norm()
        product = product + m[k] * (size - alpha).relu() / size * torch.outer(u[:, k], v[:, k])
    return product


def scrambled(*args, threshold: float = 0.4, **options) -> LowRankWeight:
    """Factors of any scale and sign, in float64, of which the threshold cuts some."""
    matrix = LowRankWeight(
        *args, dtype=torch.float64, raw_threshold_init=torch.tensor(threshold).log().item(), **options
    )
    with torch.no_grad():
        for parameter in (matrix.u, matrix.m, matrix.v):
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return matrix


def cut_all_but(matrix: LowRankWeight, rank: int) -> None:
    sizes = matrix.singular_values().sort(descending=True).values
    nn.init.constant_(matrix.raw_threshold, ((sizes[rank - 1] + sizes[rank]) / 2).log().item() if rank else 5.0)


@pytest.mark.parametrize("g", G)
def test_it_is_the_formula(g: str) -> None:
    matrix = scrambled(7, 5, g=g)
    nn.init.constant_(matrix.raw_threshold, 0.4 if g == "identity" else -0.8)
    expected = literal(matrix)
    assert 0 < matrix.rank < 5
    torch.testing.assert_close(matrix.weight(), expected)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(matrix(x), x @ expected.mT)
    bias = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(matrix(x, bias), x @ expected.mT + bias)
    torch.testing.assert_close((matrix.u * matrix.spectrum()) @ matrix.v.mT, expected)


def test_the_masked_gradient_is_the_formulas() -> None:
    matrix = scrambled(6, 4, gradient="masked")
    probe = torch.randn(6, 4, dtype=torch.float64)
    parameters = list(matrix.parameters())
    grads = torch.autograd.grad((matrix.weight() * probe).sum(), parameters)
    expected = torch.autograd.grad((literal(matrix) * probe).sum(), parameters)
    assert len(parameters) == 4
    torch.testing.assert_close(grads, expected)


def test_the_straight_through_gradient_is_the_derivations() -> None:
    """docs/derivations.md, "Low-rank weight"; of what is cut m moves, the factors do not."""
    matrix = scrambled(6, 4, gradient="straight_through")
    grad = torch.randn(6, 4, dtype=torch.float64)
    matrix.weight().backward(grad)
    u, v, s = matrix.u.detach(), matrix.v.detach(), matrix.spectrum().detach()
    assert 0 < matrix.rank < 4
    a, b = u / u.norm(dim=0), v / v.norm(dim=0)
    c = torch.einsum("ik,ij,jk->k", a, grad, b)
    torch.testing.assert_close(matrix.m.grad, u.norm(dim=0) * v.norm(dim=0) * c)
    torch.testing.assert_close(matrix.u.grad, s * (grad @ v))
    torch.testing.assert_close(matrix.v.grad, s * (grad.mT @ u))
    torch.testing.assert_close(matrix.raw_threshold.grad, -matrix.threshold.detach() * (s.sign() * c).sum())


@pytest.mark.parametrize("raw", [-30.0, -10.0, -1.0, 0.7])
@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (4, 7)])
def test_from_dense_is_the_matrix_at_any_threshold(rows: int, columns: int, raw: float) -> None:
    dense = torch.randn(rows, columns)
    matrix = LowRankWeight.from_dense(dense, raw_threshold_init=raw)
    assert matrix.rank == 4
    assert matrix.raw_threshold.item() == pytest.approx(raw)
    torch.testing.assert_close(matrix.weight(), dense, rtol=1e-5, atol=1e-5)
    sigma = torch.linalg.svdvals(dense)
    torch.testing.assert_close(matrix.spectrum(), sigma, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.singular_values(), sigma + matrix.threshold)


def test_from_dense_with_fewer_components_is_the_best_approximation() -> None:
    dense = torch.randn(7, 5)
    matrix = LowRankWeight.from_dense(dense, 2, recurrent=True, g="softplus")
    u, sigma, vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(matrix.weight(), (u[:, :2] * sigma[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)
    assert (matrix.max_rank, matrix.recurrent, matrix.g, matrix.shape) == (2, True, "softplus", (7, 5))


def test_a_new_one_is_drawn_as_in_linear() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(5, 7)
    torch.manual_seed(1)
    torch.testing.assert_close(LowRankWeight(7, 5).weight(), linear.weight, rtol=1e-5, atol=1e-6)


def test_reset_parameters_begins_anew() -> None:
    matrix = LowRankWeight(7, 5, raw_threshold_init=-3.0)
    nn.init.constant_(matrix.raw_threshold, 1.0)
    torch.manual_seed(1)
    matrix.reset_parameters()
    torch.manual_seed(1)
    torch.testing.assert_close(matrix.weight(), LowRankWeight(7, 5).weight(), rtol=1e-5, atol=1e-6)
    assert matrix.raw_threshold.item() == -3


def test_scaling_a_column_against_m_changes_neither_the_matrix_nor_what_is_cut() -> None:
    matrix = scrambled(7, 5)
    scale = torch.tensor([1e-3, -2.0, 0.5, 300.0, -1e4], dtype=torch.float64)
    twin = copy.deepcopy(matrix)
    with torch.no_grad():
        twin.u.mul_(scale)
        twin.m.div_(scale)
    assert 0 < matrix.rank < 5
    assert ((twin.spectrum() == 0) == (matrix.spectrum() == 0)).all()
    torch.testing.assert_close(twin.weight(), matrix.weight())
    torch.testing.assert_close(twin.singular_values(), matrix.singular_values())
    torch.testing.assert_close(twin.pruning_offsets(), matrix.pruning_offsets())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pruning_offsets_cut_one_component_after_the_other(dtype: torch.dtype) -> None:
    matrix = scrambled(9, 6, threshold=1e-4).to(dtype)
    offsets = matrix.pruning_offsets().sort().values
    assert offsets.isfinite().all()
    raw = matrix.raw_threshold.detach().clone()
    for k, offset in enumerate(offsets):
        nn.init.constant_(matrix.raw_threshold, (raw + offset + 1e-5).item())
        assert matrix.rank == 5 - k
        nn.init.constant_(matrix.raw_threshold, (raw + offset - 1e-5).item())
        assert matrix.rank == 6 - k


def test_scale_threshold() -> None:
    matrix = LowRankWeight(7, 5, raw_threshold_init=-2.0)
    before = matrix.threshold.item()
    matrix.scale_threshold(1.7)
    assert matrix.threshold.item() == pytest.approx(1.7 * before)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_compact_is_the_surviving_components(rank: int) -> None:
    matrix = scrambled(7, 5, recurrent=True).eval()
    cut_all_but(matrix, rank)
    assert matrix.rank == rank
    compact = matrix.compact()
    torch.testing.assert_close(compact.weight(), matrix.weight())
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(compact(x), matrix(x))
    assert [name for name, _ in compact.named_parameters()] == ["u", "v"]
    assert (compact.u.shape, compact.v.shape) == ((7, max(rank, 1)), (5, max(rank, 1)))
    assert (compact.recurrent, compact.training, compact.rank) == (True, False, max(rank, 1))
    sizes = compact.singular_values()
    assert (sizes == sizes.sort(descending=True).values).all()
    assert compact.threshold.item() == 0
    assert "threshold" not in repr(compact)


def test_compact_falls_back_to_dense_where_factors_are_not_smaller() -> None:
    matrix = LowRankWeight(6, 3)  # 2 (6 + 3) = 6 * 3
    cut_all_but(matrix, 2)
    assert matrix.compact() is None
    cut_all_but(matrix, 1)
    assert matrix.compact().max_rank == 1
    assert [matrix.compact_cost(rank) for rank in (0, 1, 2, 3)] == [0, 9, 18, 18]


def test_compact_of_a_compact_one_is_the_same() -> None:
    matrix = scrambled(7, 5)
    cut_all_but(matrix, 2)
    compact = matrix.compact()
    torch.testing.assert_close(compact.compact().weight(), compact.weight())


def test_a_component_without_direction_is_none() -> None:
    matrix = LowRankWeight(7, 5)
    nn.init.zeros_(matrix.u)
    loss = 100 * matrix.weight().sum()
    loss.backward()
    assert matrix.rank == 0
    assert all(parameter.grad.isfinite().all() for parameter in matrix.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_the_threshold_in_float32(dtype: torch.dtype) -> None:
    for matrix in (LowRankWeight(7, 5).to(dtype), LowRankWeight(7, 5, dtype=dtype)):
        assert matrix.raw_threshold.dtype == torch.float32
        assert matrix.singular_values().dtype == torch.float32
        assert {matrix.u.dtype, matrix.m.dtype, matrix.v.dtype, matrix.spectrum().dtype} == {dtype}
        x = torch.randn(3, 5, dtype=dtype)
        assert matrix(x).dtype == dtype
        torch.testing.assert_close(matrix(x).double(), x.double() @ matrix.double().weight().mT, rtol=0.05, atol=0.05)


def test_autocast() -> None:
    linear = LowRankLinear(5, 7)
    x = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = linear(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), linear(x), rtol=0.05, atol=0.02)


def test_copies_and_state() -> None:
    matrix = LowRankWeight(7, 5, 3, raw_threshold_init=-2.0)
    for twin in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert torch.equal(twin.weight(), matrix.weight())
    file = io.BytesIO()
    torch.save(matrix.state_dict(), file)
    file.seek(0)
    other = LowRankWeight(7, 5, 3)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.weight(), matrix.weight())
    assert list(matrix.state_dict()) == ["u", "v", "m", "raw_threshold", "threshold_options"]
    on_meta = LowRankWeight(7, 5, device="meta")
    assert on_meta.to_empty(device="cpu").u.shape == (7, 5)
    assert on_meta.raw_threshold.item() == -10
    assert "max_rank=5" in repr(LowRankWeight(7, 5, device="meta"))
    assert "rank=3, threshold=0.1353" in repr(matrix)
    zeros = {name: torch.zeros_like(value) for name, value in matrix.named_parameters()}
    assert not functional_call(matrix, zeros, torch.ones(5)).any()


def test_building_on_meta_draws_nothing() -> None:
    state = torch.get_rng_state()
    LowRankWeight(7, 5, device="meta")
    LowRankWeight.from_dense(torch.ones(7, 5))
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_name_what_is_wrong() -> None:
    for options, message in (
        ({"max_rank": 6}, "max_rank must be from 1 to 5 for a 7 x 5 matrix, got 6"),
        ({"max_rank": 0}, "max_rank must be from 1 to 5 for a 7 x 5 matrix, got 0"),
        ({"g": "tanh"}, "g must be one of .*, got 'tanh'"),
        ({"gradient": "none"}, "gradient must be 'masked' or 'straight_through', got 'none'"),
        ({"raw_threshold_init": float("nan")}, "raw_threshold_init must be finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankWeight(7, 5, **options)
    with pytest.raises(ValueError, match=r"weight .*\(7, 5\).* \(5, 7\)"):
        LowRankWeight(7, 5).set_weight(torch.zeros(5, 7))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs_at_full_rank(bias: bool) -> None:
    dense = nn.Linear(5, 7, bias)
    layer = LowRankLinear.from_dense(dense.eval(), raw_threshold_init=-20.0)
    x = torch.randn(2, 3, 5)
    results = []
    for module in (layer, dense):
        own = x.clone().requires_grad_()
        output = module(own)
        output.square().sum().backward()
        results.append([output, own.grad, *([module.bias.grad] if bias else [])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    chain = torch.autograd.grad(layer.weight.weight(), list(layer.weight.parameters()), dense.weight.grad)
    torch.testing.assert_close([p.grad for p in layer.weight.parameters()], list(chain), rtol=1e-4, atol=1e-5)
    back = layer.to_dense()
    assert type(back) is nn.Linear
    torch.testing.assert_close(back(x), dense(x), rtol=1e-5, atol=1e-5)
    assert (layer.training, back.training) == (False, False)
    assert (back.bias is None) == (not bias)


def test_a_new_linear_is_torchs() -> None:
    torch.manual_seed(1)
    dense = nn.Linear(5, 7)
    torch.manual_seed(1)
    layer = LowRankLinear(5, 7)
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)
    assert repr(layer).startswith(
        "LowRankLinear(\n  in_features=5, out_features=7, bias=True\n  (weight): LowRankWeight(7,"
    )


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 5])
def test_linear_compact(rank: int) -> None:
    layer = LowRankLinear(5, 7)
    if rank < 5:
        cut_all_but(layer.weight, rank)
    assert isinstance(layer, LowRankLayer)
    assert layer.ranks() == {"weight": rank}
    compact = layer.compact()
    x = torch.randn(3, 5)
    torch.testing.assert_close(compact(x), layer(x))
    assert compact.ranks() == ({"weight": max(rank, 1)} if rank < 3 else {})  # 3 (7 + 5) >= 7 * 5
    assert isinstance(compact.weight, nn.Parameter) == (rank >= 3)
    assert compact.bias is not layer.bias
    rebuilt = LowRankLinear(5, 7, ranks=compact.ranks())
    rebuilt.load_state_dict(compact.state_dict())
    assert torch.equal(rebuilt(x), compact(x))
    torch.testing.assert_close(compact.compact()(x), layer(x))
    torch.testing.assert_close(compact.to_dense()(x), layer(x))


def test_linear_ranks_names_its_weight_only() -> None:
    with pytest.raises(ValueError, match="ranks may name weight; got bias"):
        LowRankLinear(5, 7, ranks={"bias": 1})


def test_refactor_keeps_the_matrix_and_finds_its_singular_values():
    torch.manual_seed(0)
    matrix = LowRankWeight(12, 9)
    with torch.no_grad():
        matrix.u.add_(0.2 * torch.randn_like(matrix.u)).mul_(torch.rand(9) + 0.5)
        matrix.m[2].neg_()
        matrix.raw_threshold.fill_(-1.2)
    weight, cut = matrix.weight().detach(), matrix.spectrum() == 0
    columns = matrix.u[:, cut].detach().clone()
    assert 0 < cut.sum() < 8
    matrix.refactor()
    torch.testing.assert_close(matrix.weight(), weight)
    sizes = (matrix.singular_values()[~cut] - matrix.threshold).sort(descending=True).values
    torch.testing.assert_close(sizes, torch.linalg.svdvals(weight)[: len(sizes)])
    assert torch.equal(matrix.u[:, cut], columns)


def test_refactor_leaves_each_component_where_it_is_and_as_it_looks():
    torch.manual_seed(0)
    matrix = LowRankWeight(12, 9, raw_threshold_init=-1.2, dtype=torch.float64)
    with torch.no_grad():
        matrix.m.copy_(torch.rand(9) + 0.2)
        matrix.refactor()
        order, signs = torch.randperm(9), torch.randn(9).sign()
        for factor in (matrix.u, matrix.v):  # the same matrix in another order, with pairs of signs
            factor.copy_(factor[:, order] * signs)
        matrix.m.copy_(matrix.m[order])
    before = {name: value.clone() for name, value in matrix.state_dict().items()}
    assert 3 < matrix.rank < 9
    matrix.refactor()
    for name, value in matrix.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_settle_lowers_the_threshold_and_keeps_the_matrix(dtype):
    torch.manual_seed(0)
    matrix = LowRankWeight(12, 9, raw_threshold_init=-1.2, dtype=dtype)
    with torch.no_grad():
        matrix.m.sub_(matrix.threshold)
        matrix.m[0].neg_()
    weight, spectrum = matrix.weight().detach(), matrix.spectrum().detach()
    assert 0 < matrix.rank < 9
    matrix.settle(torch.tensor([-10.0]))
    assert matrix.threshold.item() == pytest.approx(4.54e-5, rel=1e-3)
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(matrix.weight(), weight, rtol=rounding, atol=rounding)
    assert torch.equal(matrix.m == 0, spectrum == 0)


@pytest.mark.parametrize(
    "use",
    [
        lambda matrix: matrix.scale_threshold(2.0),
        lambda matrix: matrix.settle(torch.zeros(1)),
        lambda matrix: matrix.refactor(),
        lambda matrix: matrix.pruning_offsets(),
    ],
)
def test_a_matrix_without_a_threshold_says_so(use):
    with pytest.raises(ValueError, match="has no threshold"):
        use(LowRankWeight(4, 3, thresholded=False))
