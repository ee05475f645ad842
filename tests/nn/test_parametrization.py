"""Thresholds in front of the weights of modules that keep their own forward."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from str_triton import STRLinear, densify, sparsify
from str_triton.nn import holder, matrices, thresholded_weights
from tests import oracle

OPTIONS = {"g": "identity", "initial_threshold": 0.1}


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Conv1D(nn.Module):
    """Transformers' linear layer with a transposed weight."""

    def __init__(self, out: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(features, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


Conv1D.__module__ = "transformers.pytorch_utils"


class Experts(nn.Module):
    """A mixture of experts that reads its 3-D weight once for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.3 * torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return sum(x @ self.up[i] for i in range(len(self.up)))


def patched() -> nn.Module:
    layer = nn.Linear(4, 5)
    layer.forward = lambda input: nn.functional.linear(input, layer.weight)
    return layer


CASES = {
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 4, 3), lambda: (torch.randn(2, 2, 5),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3, groups=2), lambda: (torch.randn(2, 2, 5, 5),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), lambda: (torch.randn(2, 2, 3, 3, 3),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4, mode="sum"), lambda: (torch.randint(9, (3, 4)),)),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "Scaled": (lambda: Scaled(4, 5), lambda: (torch.randn(2, 4),)),
    "Standardized": (lambda: Standardized(2, 3, 3), lambda: (torch.randn(2, 2, 5, 5),)),
    "patched": (patched, lambda: (torch.randn(2, 4),)),
    "Conv1D": (lambda: Conv1D(5, 4), lambda: (torch.randn(2, 4),)),
    "GRUCell": (lambda: nn.GRUCell(4, 5), lambda: (torch.randn(2, 4), torch.randn(2, 5))),
    "LSTMCell": (lambda: nn.LSTMCell(4, 5), lambda: (torch.randn(2, 4),)),
    "RNNCell": (lambda: nn.RNNCell(4, 5), lambda: (torch.randn(2, 4), torch.randn(2, 5))),
    "GRU": (lambda: nn.GRU(4, 5, 2, bidirectional=True), lambda: (torch.randn(3, 2, 4),)),
    "GRU-no-bias": (lambda: nn.GRU(4, 5, bias=False, batch_first=True), lambda: (torch.randn(3, 2, 4),)),
    "LSTM": (lambda: nn.LSTM(4, 5, 2, proj_size=3), lambda: (torch.randn(3, 2, 4),)),
    "RNN": (lambda: nn.RNN(4, 5, nonlinearity="relu"), lambda: (torch.randn(3, 2, 4),)),
    "packed": (
        lambda: nn.LSTM(4, 5, bidirectional=True),
        lambda: (pack_padded_sequence(torch.randn(3, 2, 4), torch.tensor([3, 1])),),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        lambda: tuple(torch.randn(3, 2, 4) for _ in range(3)),
    ),
    "attention-kdim": (
        lambda: nn.MultiheadAttention(4, 2, kdim=4, vdim=4),
        lambda: tuple(torch.randn(3, 2, 4) for _ in range(3)),
    ),
    "Experts": (Experts, lambda: (torch.randn(2, 4),)),
}
every_case = pytest.mark.parametrize(("build", "example"), CASES.values(), ids=CASES)
RECURRENT = ("GRU", "GRU-no-bias", "LSTM", "RNN", "packed")
every_rnn = pytest.mark.parametrize(("build", "example"), [CASES[name] for name in RECURRENT], ids=RECURRENT)


def tensors(output: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def wrapped(build) -> nn.Module:
    """A model whose one layer is `build()`, with larger weights, so that a threshold of 0.1 prunes some."""
    model = nn.ModuleList([build()])
    with torch.no_grad():
        for matrix in matrices(model):
            matrix.sources[0].copy_(0.3 * torch.randn(matrix.sources[0].shape))
    return model


def sparsified(build, **options) -> nn.Module:
    return sparsify(wrapped(build), parameters=["*.up"] if build is Experts else None, **{**OPTIONS, **options})


@every_case
def test_outputs_and_gradients_are_those_of_thresholded_weights(build, example):
    model, x = wrapped(build).double(), [value.double() if isinstance(value, Tensor) else value for value in example()]
    if build is CASES["EmbeddingBag"][0]:
        x = [value.long() for value in x]
    elif not isinstance(x[0], Tensor):
        x = [x[0].to(torch.float64)]
    plain = copy.deepcopy(model)[0]
    if build is patched:
        plain = nn.Linear(4, 5, bias=False, dtype=torch.float64)
        plain.load_state_dict(model[0].state_dict(), strict=False)
    sparsify(model, parameters=["*.up"] if build is Experts else None, **OPTIONS)
    weights = list(thresholded_weights(model))
    assert [weight.name for weight in weights] == [matrix.name for matrix in matrices(model)]
    leaves = {
        w.name: (w.dense.detach().clone().requires_grad_(), w.raw.detach().clone().requires_grad_()) for w in weights
    }
    values = {
        (w.name.removeprefix("0") or ".weight").lstrip(".")
        + (".weight" if w.name.endswith("out_proj") else ""): oracle.soft_threshold_straight_through(
            *leaves[w.name], "identity"
        )
        for w in weights
    }
    rnn = isinstance(plain, nn.RNNBase)
    expected = rnn_outputs(plain, values, x) if rnn else tensors(functional_call(plain, values, tuple(x)))
    actual = tensors(model[0](*x))
    torch.testing.assert_close(actual, expected)
    sum(t.square().sum() for t in actual).backward()
    sum(t.square().sum() for t in expected).backward()
    for weight in weights:
        dense, raw = leaves[weight.name]
        assert 0 < (weight.sparse == 0).sum() < weight.dense.numel()
        torch.testing.assert_close(weight.dense.grad, dense.grad)
        torch.testing.assert_close(weight.raw.grad, raw.grad)


def rnn_outputs(plain: nn.RNNBase, values: dict[str, Tensor], x: list) -> list[Tensor]:
    plain._flat_weights = [values.get(name, getattr(plain, name)) for name in plain._flat_weights_names]
    plain._update_flat_weights = lambda: None
    return tensors(plain(*x))


@every_case
@pytest.mark.parametrize("granularity", ["layer", "filter", "weight", "global"])
def test_densify_gives_the_plain_module_back(build, example, granularity):
    model = wrapped(build)
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    sparsify(model, granularity=granularity, parameters=["*.up"] if build is Experts else None, **OPTIONS)
    sparse, x = copy.deepcopy(model), example()
    expected = sparse[0](*x)
    densify(model)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == parameters
    if build is not patched:  # Its forward reads the first layer.
        assert all(map(torch.equal, tensors(model[0](*x)), tensors(expected)))
        assert all(map(torch.equal, tensors(sparse[0](*x)), tensors(expected)))  # densify of a copy leaves it whole
    for matrix in matrices(model):
        assert (matrix.sources[0] == 0).any()
        assert not (matrix.sources[0] == 0).signbit().any()


@every_rnn
def test_a_recurrent_layer_follows_its_weights_everywhere(build, example):
    model, x = sparsified(build), example()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for twin in (model, copy.deepcopy(model), model.double().float(), model.eval().train()):
        twin.train()
        first = tensors(twin[0](*x))
        sum(t.square().sum() for t in first).backward()
        with torch.no_grad():
            for weight in thresholded_weights(twin):
                assert weight.dense.grad.any()
                assert weight.raw.grad.any()
                weight.raw.fill_(10.0)
        second = twin[0](*x)
        assert not any(torch.equal(a, b) for a, b in zip(first, tensors(second), strict=True))
        with torch.no_grad():
            for weight in thresholded_weights(twin):
                weight.raw.fill_(0.1)
        assert all(map(torch.equal, tensors(twin[0](*x)), first))
    optimizer.step()
    assert not torch.equal(tensors(model[0](*x))[0], first[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert tensors(model[0](*x))[0].isfinite().all()
    model.bfloat16()
    assert all(weight.raw.dtype == torch.float32 for weight in thresholded_weights(model))
    assert all(weight.sparse.dtype == torch.bfloat16 for weight in thresholded_weights(model))


@pytest.mark.parametrize("name", ["Experts", "LSTM"])
def test_a_weight_read_many_times_is_thresholded_once_in_a_forward(name, monkeypatch):
    calls = []
    original = holder.soft_threshold
    monkeypatch.setattr(holder, "soft_threshold", lambda *a, **k: calls.append(1) or original(*a, **k))
    build, example = CASES[name]
    model, x = sparsified(build), example()
    weights = list(thresholded_weights(model))
    calls.clear()
    output = model[0](*x)
    assert len(calls) == len(weights)
    tensors(output)[0].sum().backward()
    with torch.no_grad():
        model[0](*x)
    for weight in weights:  # Nothing is kept.
        weight.raw.data.fill_(0.2)
        assert torch.equal(weight.sparse, oracle.soft_threshold(weight.dense, weight.raw, "identity"))


def test_a_failing_forward_keeps_nothing():
    model = sparsified(Experts)
    with pytest.raises(RuntimeError):
        model[0](torch.randn(2, 3))
    assert model[0].parametrizations.up[0]._computed is None


def test_signature_name_and_class_stay_recognizable():
    model = sparsified(CASES["GRU"][0])
    assert isinstance(model[0], nn.GRU)
    assert "GRU(" in repr(model)
    assert inspect.signature(sparsified(CASES["Bilinear"][0])[0].forward) == inspect.signature(
        nn.Bilinear(1, 1, 1).forward
    )


def test_a_parameter_of_the_model_itself_is_thresholded_in_place():
    model = Experts()
    assert sparsify(model, parameters="up") is model
    assert densify(model) is model
    assert type(model) is Experts


@pytest.mark.parametrize("build", [CASES["GRU"][0], CASES["attention"][0], CASES["Bilinear"][0]])
def test_reset_parameters_draws_the_weights_and_sets_the_first_thresholds(build):
    model = sparsified(build, initial_threshold=0.05)[0]
    before = [weight.dense.detach().clone() for weight in thresholded_weights(model)]
    with torch.no_grad():
        for weight in thresholded_weights(model):
            weight.raw.fill_(3.0)
    model._reset_parameters() if isinstance(model, nn.MultiheadAttention) else model.reset_parameters()
    for weight, old in zip(thresholded_weights(model), before, strict=True):
        if weight.module is model:
            assert not torch.equal(weight.dense, old)
            assert weight.raw.item() == pytest.approx(0.05)


def test_foreign_parametrizations_are_not_lost():
    model = sparsified(CASES["Bilinear"][0])
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Softplus())
    with pytest.raises(ValueError, match="further parametrizations"):
        densify(model)


def test_tied_weights_of_different_kinds_share_one_threshold():
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["bag"].weight
    sparsify(model, **OPTIONS)
    bag, head = thresholded_weights(model)
    assert bag.dense is head.dense
    assert bag.raw is head.raw
    assert isinstance(head.holder, STRLinear)
    densify(model)
    assert model["head"].weight is model["bag"].weight


def test_compiled_in_one_graph():
    model = nn.Sequential(Scaled(4, 5), Experts())
    model[1].up = nn.Parameter(torch.randn(3, 5, 2))
    sparsify(model, parameters="1.up", **OPTIONS)
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
