"""Batches of no, one and many examples, for networks that were saved and loaded: no model stands behind these."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from str_triton import LowRankLSTM, deploy
from str_triton.deploy.sparse.graph.guards import compile_guard
from tests.deploy.sparse_networks import prune, same

pytestmark = [pytest.mark.usefixtures("kernels", "quick"), pytest.mark.filterwarnings("ignore:Sparse CSR")]


class Pooled(nn.Module):
    """A convolution, a norm, a global pool and a linear layer."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), norm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).relu().mean((2, 3)))


class Steps(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM], batch_first: bool = True) -> None:
        super().__init__()
        self.steps, self.head = kind(6, 8, batch_first=batch_first, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x)[0])


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2, enable_nested_tensor=False)


def loaded(model: nn.Module, example: Tensor, folder: Path) -> nn.Module:
    compiled = deploy.compile_sparse(model, example)
    compiled.save(folder / "net")
    return deploy.load_sparse(folder / "net")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Pooled(nn.BatchNorm2d), (3, 9, 9)),
        (lambda: Pooled(nn.InstanceNorm2d), (3, 9, 9)),
        (encoder, (5, 6)),
        (lambda: Steps(nn.GRU), (5, 6)),
        (lambda: Steps(nn.LSTM), (5, 6)),
    ],
)
def test_batches_of_a_loaded_network(
    by_kernels, tmp_path: Path, make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int
) -> None:
    model = prune(make(), 0.5)
    network = loaded(model, torch.randn(batch, *shape), tmp_path)
    for other in (0, 1, 2, 5, 0):
        same(model, network, torch.randn(other, *shape))


def test_no_sequences_where_the_batch_is_not_the_first_dimension(by_kernels, tmp_path: Path) -> None:
    model = prune(Steps(nn.GRU, batch_first=False), 0.5)
    network = loaded(model, torch.randn(5, 2, 6), tmp_path)
    for steps, batch in ((5, 0), (7, 0), (3, 4)):
        same(model, network, torch.randn(steps, batch, 6))


class Refusing(nn.Module):
    """A linear layer for sequences, which gives something of its own for none, or refuses them."""

    def __init__(self, otherwise: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.layer, self.otherwise = nn.Linear(6, 6), otherwise

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            if self.otherwise is None:
                raise RuntimeError("no sequences")
            return self.otherwise(x)
        return self.layer(x)


@pytest.mark.parametrize(
    "otherwise",
    [
        lambda x: x.new_zeros(0, 9),
        lambda x: x.new_zeros(0, 5, 6),  # which is right for the example's five steps alone
        lambda x: x.new_zeros(x.shape).double(),
    ],
)
def test_a_model_with_another_result_for_no_sequences(by_kernels, tmp_path: Path, otherwise) -> None:
    model, x = prune(Refusing(otherwise)), torch.randn(0, 5, 6)
    compiled = deploy.compile_sparse(model, torch.randn(2, 5, 6))
    torch.testing.assert_close(compiled(x), otherwise(x), rtol=0, atol=0)
    compiled.save(tmp_path / "net")
    with pytest.raises(ValueError, match=r"compiled for sizes with (\w+) != 0, got \1 = 0; \1 is dimension 0"):
        deploy.load_sparse(tmp_path / "net")(x)


def test_a_model_that_raises_for_no_sequences(by_kernels, tmp_path: Path) -> None:
    model, x = prune(Refusing(None)), torch.randn(0, 5, 6)
    compiled = deploy.compile_sparse(model, torch.randn(2, 5, 6))
    with pytest.raises(RuntimeError, match="no sequences"):
        model(x)
    with pytest.raises(ValueError, match="compiled for sizes with"):
        compiled(x)
    compiled.save(tmp_path / "net")
    with pytest.raises(ValueError, match="compiled for sizes with"):
        deploy.load_sparse(tmp_path / "net")(x)


@pytest.mark.parametrize(
    "is_other",
    [
        lambda x: not x.shape[0],
        lambda x: x.numel() == 0,
        lambda x: x.shape[1] < 1,
        lambda x: max(x.shape[0], 1) == 1 < x.shape[1],
    ],
)
def test_a_branch_that_the_export_does_not_see(by_kernels, tmp_path: Path, is_other) -> None:
    """torch.export keeps no condition for these branches."""

    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y[..., :4] if is_other(x) else 2 * y

    model = prune(Branch(6, 6))
    compiled = deploy.compile_sparse(model, torch.randn(3, 5, 6))
    compiled.save(tmp_path / "net")
    network = deploy.load_sparse(tmp_path / "net")
    for shape in ((0, 5, 6), (3, 0, 6), (1, 5, 6), (2, 5, 6)):
        x = torch.randn(shape)
        same(model, compiled, x)
        if network.signature.fits([x]):
            same(model, network, x)


@pytest.mark.parametrize("counts_all", [True, False])
def test_the_state_after_a_call_without_sequences(by_kernels, tmp_path: Path, counts_all: bool) -> None:
    class Counting(nn.Linear):
        """Calls are counted, or only those with sequences."""

        def __init__(self) -> None:
            super().__init__(6, 6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if counts_all or x.shape[0] > 0:
                self.calls += 1
            return super().forward(x) + self.calls

    model, x = prune(Counting()), torch.randn(2, 6)
    network = loaded(model, x, tmp_path)
    if counts_all:
        assert network(x[:0]).shape == (0, 6)
        torch.testing.assert_close(network(x), model(x) + 1, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="compiled for sizes with"):
            network(x[:0])


def test_a_condition_ends_where_its_value_is_known() -> None:
    check = compile_guard("s == 0 or 6 // s > 2")
    assert [check({"s": s}) for s in (0, 2, 3)] == [True, True, False]
    assert not compile_guard("s != 0 and 6 // s > 2")({"s": 0})


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("2 * math.ceil((1 + (s - 1) // 8) / 2) == 1 + (s - 1) // 8", [9, 15, 16, 32]),
        ("math.trunc(s / 16) == math.floor((s + 1) / 16)", [8, 9, 16, 17, 32]),
        ("max(s, 16) - min(s, 9) == abs(s - 9)", [16, 17, 32]),
        (f"math.ceil({' * '.join(['9e18'] * 17)}) > s", []),  # an infinite number
    ],
)
def test_functions_in_conditions(text: str, sizes: list[int]) -> None:
    check = compile_guard(text)
    assert [s for s in (8, 9, 15, 16, 17, 32) if check({"s": s})] == sizes


@pytest.mark.parametrize(
    "text", ["math.exp(s)", "os.system(s)", "math.ceil(s, 2)", "(math.ceil)(*s)", "abs()", "f(s)(s)"]
)
def test_other_functions_are_no_conditions(text: str) -> None:
    with pytest.raises(ValueError, match="is no condition on sizes"):
        compile_guard(text)


def test_masks_that_are_combined_by_signs(by_kernels, tmp_path: Path) -> None:
    """Attention masks of language models are: the operations are named after Python's methods."""

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.masked_fill((y > 0) & (y < 1) | (y > 2) ^ (x > 0), 0.0).rot90(1, (1, 2))

    model = prune(Masked(6, 6))
    network = loaded(model, torch.randn(2, 5, 6), tmp_path)
    for batch in (0, 1, 3):
        same(model, network, torch.randn(batch, 5, 6))


class Last(nn.Module):
    """The last output of a recurrent layer of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = LowRankLSTM(6, 8, max_rank=3, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x)[0][:, -1])


@pytest.mark.parametrize("example", [(2, 5), (1, 5), (2, 1), (1, 1)])
@pytest.mark.parametrize("make", [encoder, lambda: Steps(nn.GRU), Last])
def test_any_length_of_sequences(by_kernels, tmp_path: Path, make: Callable[[], nn.Module], example: tuple) -> None:
    model = prune(make(), 0.5)
    network = loaded(model, torch.randn(*example, 6), tmp_path)
    for other in ((2, 5), (1, 1), (3, 1), (1, 7), (4, 2)):
        same(model, network, torch.randn(*other, 6))


@pytest.mark.parametrize(
    "is_other",
    [
        lambda x: x.shape[1] == 1,
        lambda x: x.shape[1] == 1 and x.shape[0] > 3,
        lambda x: x.shape[1] == 1 and x.shape[0] == 1,
        lambda x: x.unsqueeze(0).squeeze(2).dim() == 3,  # torch.export keeps no condition
    ],
)
@pytest.mark.parametrize("example", [(2, 5), (1, 1)])
def test_a_branch_on_one_step(by_kernels, tmp_path: Path, is_other, example: tuple[int, int]) -> None:
    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return -y if is_other(x) else y

    model = Branch(6, 4).eval()
    compiled = deploy.compile_sparse(model, torch.randn(*example, 6))
    compiled.save(tmp_path / "net")
    network = deploy.load_sparse(tmp_path / "net")
    for shape in ((2, 5, 6), (1, 1, 6), (3, 1, 6), (5, 1, 6), (1, 7, 6)):
        x = torch.randn(shape)
        same(model, compiled, x)
        with contextlib.suppress(ValueError):
            same(model, network, x)
