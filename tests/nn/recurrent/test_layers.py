"""LowRankGRU and LowRankLSTM at full rank equal nn.GRU and nn.LSTM: outputs, gradients, inputs, messages."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from str_triton import LowRankGRU, LowRankLayer, LowRankLSTM, LowRankWeight
from str_triton.nn.recurrent import low_rank_rnn

LOW_RANK = {nn.GRU: LowRankGRU, nn.LSTM: LowRankLSTM}
INPUT, HIDDEN, STEPS = 3, 4, 5
LENGTHS = {"packed": [5, 3, 3, 1], "packed unsorted": [3, 5, 1, 3]}
each_cell = pytest.mark.parametrize("torch_class", LOW_RANK, ids=lambda cls: cls.__name__)


def set_path(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Run every layer in factors with the op ("loop"), or with torch's kernel ("dense")."""
    monkeypatch.setattr(low_rank_rnn, "low_rank_plan", lambda *args, **kwargs: SimpleNamespace(kind=kind))
    monkeypatch.setattr(low_rank_rnn, "fastest", lambda *args, **kwargs: kind)


@pytest.fixture(params=["loop", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    set_path(monkeypatch, request.param)
    return request.param


def make_input(form: str, *, batch_first: bool) -> Tensor:
    shape = (STEPS,) if form == "2-D" else (4, STEPS) if batch_first else (STEPS, 4)
    return torch.randn(*shape, INPUT)


def packed(x: Tensor, form: str, *, batch_first: bool) -> Tensor | PackedSequence:
    if form not in LENGTHS:
        return x
    return pack_padded_sequence(x, torch.tensor(LENGTHS[form]), batch_first, enforce_sorted=form == "packed")


def run(layer: nn.Module, x: Tensor, states: list[Tensor], form: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs, states, and the gradients of a fixed loss for the input, the states and all parameters."""
    x = x.clone().requires_grad_()
    states = [state.clone().requires_grad_() for state in states]
    hx = None if not states else states[0] if isinstance(layer, nn.GRU | LowRankGRU) else tuple(states)
    output, final = layer(packed(x, form, batch_first=layer.batch_first), hx)
    final = [final] if isinstance(final, Tensor) else list(final)
    results = [output, *final]
    if form in LENGTHS:
        assert type(output) is PackedSequence
        results = [output.data, *final, *(part for part in output[1:] if part is not None)]
    losses = [(part * torch.linspace(0.5, 2, part.numel()).view_as(part)).sum() for part in results[: 1 + len(final)]]
    return results, list(torch.autograd.grad(sum(losses), [x, *states, *layer.parameters()]))


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert [a.shape for a in actual] == [e.shape for e in expected]
    torch.testing.assert_close(
        *(torch.cat([t.flatten() for t in ts]) for ts in (actual, expected)), rtol=1e-5, atol=1e-5
    )


@each_cell
@pytest.mark.parametrize("factorize", ["both", "recurrent", "none"])
def test_outputs_and_gradients_are_torchs(torch_class: type, factorize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for num_layers, bias, bidirectional in itertools.product([1, 2], [True, False], [False, True]):
        arguments = INPUT, HIDDEN, num_layers, bias, False, 0.0, bidirectional
        torch.manual_seed(num_layers)
        dense = torch_class(*arguments)
        torch.manual_seed(num_layers)
        layer = LOW_RANK[torch_class](*arguments, factorize=factorize)
        # The dense weights as functions of the layer's parameters, so that torch's gradients reach these.
        names = [name for name, _ in dense.named_parameters()]
        owns = [getattr(layer, name) for name in names]
        weights = [own.weight() if isinstance(own, LowRankWeight) else own * 1 for own in owns]
        for batch_first, form, stateful in itertools.product([False, True], ["2-D", "3-D", *LENGTHS], [False, True]):
            dense.batch_first = layer.batch_first = batch_first
            x = make_input(form, batch_first=batch_first)
            shape = num_layers * (1 + bidirectional), *([] if form == "2-D" else [4]), HIDDEN
            states = [torch.randn(shape) for _ in range(1 + (torch_class is nn.LSTM))] if stateful else []
            results, grads = run(dense, x, states, form)
            inputs, grads = grads[: 1 + len(states)], grads[1 + len(states) :]
            grads = torch.autograd.grad(weights, list(layer.parameters()), grads, retain_graph=True)
            # A layer without factors is always dense, whatever the plan.
            for kind in ("loop",) if factorize == "none" else ("loop", "dense"):
                set_path(monkeypatch, kind)
                own_results, own_grads = run(layer, x, states, form)
                assert_same(own_results, results)
                assert_same(own_grads, [*inputs, *grads])


@each_cell
def test_factorize_names_the_factored_matrices(torch_class: type) -> None:
    layer_class = LOW_RANK[torch_class]
    both = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
    recurrent = ["weight_hh_l0", "weight_hh_l0_reverse"]
    assert list(layer_class(3, 4, bidirectional=True).factors()) == both
    assert list(layer_class(3, 4, bidirectional=True, factorize="recurrent").factors()) == recurrent
    assert list(layer_class(3, 4, bidirectional=True, factorize="none").factors()) == []


@each_cell
def test_dropout_falls_between_layers_and_only_in_training(torch_class: type, path: str) -> None:
    arguments = INPUT, HIDDEN, 3, True, False, 0.5, True
    dense = torch_class(*arguments)
    layer = LOW_RANK[torch_class].from_dense(dense)
    x = torch.randn(STEPS, 2, INPUT)
    results = []
    for module in (layer, dense):
        torch.manual_seed(3)
        results.append(module(x)[0])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.eval()(x)[0], dense.eval()(x)[0])
    assert not torch.allclose(results[0], layer(x)[0], atol=1e-2)


@each_cell
def test_the_plan_is_asked_with_the_layers_sizes(torch_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plan(*args, **kwargs):
        asked.append((args, kwargs))
        return SimpleNamespace(kind="loop")

    monkeypatch.setattr(low_rank_rnn, "low_rank_plan", plan)
    layer = LOW_RANK[torch_class](INPUT, HIDDEN, max_rank=2, batch_first=True, dtype=torch.float64)
    x = torch.randn(6, STEPS, INPUT, dtype=torch.float64)
    layer(x)
    with torch.no_grad():
        layer(x)
    arguments, options = (layer.cell, HIDDEN, 2, 6, torch.float64), {"shared_memory": None, "packed": False}
    assert layer.cell == torch_class.__name__.lower()
    assert asked == [(arguments, options | {"training": training}) for training in (True, False)]


@each_cell
def test_a_dense_recurrent_matrix_runs_by_torchs_kernel(torch_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOW_RANK[torch_class], "_loop", None)
    layer = LOW_RANK[torch_class](INPUT, HIDDEN, factorize="none")
    assert layer(torch.randn(STEPS, INPUT))[0].shape == (STEPS, HIDDEN)


def error(layer: nn.Module, *args) -> tuple[type, str]:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        layer(*args)
    return caught.type, str(caught.value).replace("LowRank", "")


def states_of(torch_class: type, *shape: int) -> Tensor | tuple[Tensor, Tensor]:
    return torch.zeros(shape) if torch_class is nn.GRU else (torch.zeros(shape), torch.zeros(shape))


@each_cell
def test_messages_are_torchs(torch_class: type) -> None:
    dense, layer = torch_class(INPUT, HIDDEN, 2), LOW_RANK[torch_class](INPUT, HIDDEN, 2)
    x = torch.randn(STEPS, 2, INPUT)
    for wrong in (
        (torch.randn(STEPS),),
        (torch.randn(1, STEPS, 2, INPUT),),
        (torch.randn(STEPS, 2, INPUT + 1),),
        (torch.randn(STEPS, INPUT + 1),),
        (x.double(),),
        (x[:0],),
        (x, states_of(torch_class, 2, 3, HIDDEN)),
        (x, states_of(torch_class, 1, 2, HIDDEN)),
        (x, states_of(torch_class, 2, HIDDEN)),
        (x[:, 0], states_of(torch_class, 2, 1, HIDDEN)),
        (x[:, 0], states_of(torch_class, 3, HIDDEN)),
    ):
        assert error(layer, *wrong) == error(dense, *wrong)
    if torch_class is nn.LSTM:
        wrong = (x, (torch.zeros(2, 2, HIDDEN), torch.zeros(2, 2, HIDDEN + 1)))
        assert error(layer, *wrong) == error(dense, *wrong)
    else:  # nn.LSTM does not check packed input before it calls its kernel.
        for wrong in (
            (pack_padded_sequence(x, torch.tensor([5, 3])), torch.zeros(2, 3, HIDDEN)),
            (pack_padded_sequence(x[..., :2], torch.tensor([5, 3])),),
            (pack_padded_sequence(x.double(), torch.tensor([5, 3])),),
        ):
            assert error(layer, *wrong) == error(dense, *wrong)


@each_cell
def test_messages_of_the_constructor_are_torchs(torch_class: type) -> None:
    for wrong in ((0, 4), (3, 0), (3, 4, 0), (3.0, 4), (3, 4, 1, 1), (3, 4, 1, True, 1), (3, 4, 2, True, False, 2.0)):
        assert error(lambda *args: LOW_RANK[torch_class](*args), *wrong) == error(
            lambda *args: torch_class(*args), *wrong
        )
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        LOW_RANK[torch_class](3, 4, dropout=0.5)
    with pytest.raises(TypeError, match="proj_size"):
        LOW_RANK[torch_class](3, 4, proj_size=2)


@each_cell
def test_a_longer_state_than_the_packed_batch_is_refused(torch_class: type) -> None:
    """Check for an error, because torch would silently use the first rows."""
    x = pack_padded_sequence(torch.randn(STEPS, 2, INPUT), torch.tensor([3, 5]), enforce_sorted=False)
    with pytest.raises(RuntimeError, match=r"\(1, 2, 4\).* \[1, 3, 4\]"):
        LOW_RANK[torch_class](INPUT, HIDDEN)(x, states_of(torch_class, 1, 3, HIDDEN))


def test_states_of_the_wrong_kind_are_refused() -> None:
    x, state = torch.randn(STEPS, 2, INPUT), torch.zeros(1, 2, HIDDEN)
    with pytest.raises(TypeError, match=r"LowRankGRU: hx .*tensor.* tuple of 2"):
        LowRankGRU(INPUT, HIDDEN)(x, (state, state))
    with pytest.raises(TypeError, match=r"LowRankLSTM: hx .*\(h, c\), .*Tensor of 1"):
        LowRankLSTM(INPUT, HIDDEN)(x, state)
    with pytest.raises(RuntimeError, match=r"hx .*torch.float32.* torch.float64"):
        LowRankLSTM(INPUT, HIDDEN)(x, (state, state.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        LowRankLSTM(INPUT, HIDDEN)(x, (state, state.bfloat16()))


def test_options_out_of_range_are_named() -> None:
    for options, message in (
        ({"factorize": "all"}, "factorize must be one of 'both', 'recurrent', 'none', got 'all'"),
        ({"max_rank": 5}, "max_rank must be from 1 to 4 for a 12 x 4 matrix, got 5"),
        ({"max_rank": 0}, "max_rank must be from 1 to 4 for a 12 x 4 matrix, got 0"),
        ({"input_max_rank": 0}, "input_max_rank must be at least 1, got 0"),
        ({"g": "tanh"}, "g must be one of"),
        ({"ranks": {"bias_ih_l0": 1}}, "ranks may name weight_ih_l0, weight_hh_l0; got bias_ih_l0"),
        ({"ranks": {"weight_hh_l1": 1}}, "got weight_hh_l1"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankGRU(3, 4, **options)


@each_cell
@pytest.mark.parametrize("kind", ["loop", "dense", None])
def test_an_empty_batch(torch_class: type, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is not None:  # otherwise the plan decides
        set_path(monkeypatch, kind)
    layer = LOW_RANK[torch_class](INPUT, HIDDEN, 2, bidirectional=True)
    output, final = layer(torch.randn(STEPS, 0, INPUT))
    assert output.shape == (STEPS, 0, 2 * HIDDEN)
    assert (final if torch_class is nn.GRU else final[1]).shape == (4, 0, HIDDEN)


@each_cell
def test_it_is_a_low_rank_layer(torch_class: type) -> None:
    layer = LOW_RANK[torch_class](INPUT, HIDDEN, 2, max_rank=3, input_max_rank=5)
    assert isinstance(layer, LowRankLayer)
    assert layer.ranks() == {"weight_ih_l0": 3, "weight_hh_l0": 3, "weight_ih_l1": 4, "weight_hh_l1": 3}
    assert {name: factor.recurrent for name, factor in layer.factors().items()} == {
        "weight_ih_l0": False,
        "weight_hh_l0": True,
        "weight_ih_l1": False,
        "weight_hh_l1": True,
    }
    assert layer.flatten_parameters() is None
    for g, gradient in (("sigmoid", "masked"), ("softplus", "straight_through")):
        layer = LOW_RANK[torch_class](INPUT, HIDDEN, g=g, gradient=gradient, raw_threshold_init=-2.0)
        for factor in layer.factors().values():
            assert (factor.g, factor.gradient, factor.raw_threshold.item()) == (g, gradient, -2)
    layer = LOW_RANK[torch_class](INPUT, HIDDEN, 2)
    assert repr(layer).startswith(f"{type(layer).__name__}(\n  3, 4, num_layers=2\n  (weight_ih_l0): LowRankWeight(")


class Tagger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(2 * HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


@each_cell
@pytest.mark.parametrize("factorize", ["both", "none"])
def test_a_model_compiles_in_one_graph(torch_class: type, factorize: str) -> None:
    model = Tagger(LOW_RANK[torch_class](INPUT, HIDDEN, bidirectional=True, factorize=factorize))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(STEPS, 2, INPUT)
    grads = []
    for run_model in (model, compiled):
        model.zero_grad()
        run_model(x).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@each_cell
def test_a_graph_on_a_gpu_follows_the_plan(torch_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the plan's use. On the CPU a graph always holds the op, which needs no second forward pass."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(low_rank_rnn, "shared_memory_limit", lambda device: {"cuda": 227 * 1024}.get(device.type))
    with FakeTensorMode():
        inputs = {device: torch.empty(STEPS, 4, INPUT, device=device) for device in ("cpu", "cuda")}
    for hidden_size, options, on_gpu in (
        (160, {"factorize": "none"}, True),
        (160, {}, True),
        (160, {"max_rank": 8}, False),
    ):
        layer = LOW_RANK[torch_class](INPUT, hidden_size, device="meta", **options)
        for device, expected in (("cuda", on_gpu), ("cpu", False)):
            assert (layer._execution(0, inputs[device], 4, None) == "dense") is expected


@each_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(torch_class: type, dtype: torch.dtype, path: str) -> None:
    layer = LOW_RANK[torch_class](INPUT, HIDDEN, 2, bidirectional=True).to(dtype)
    x = torch.randn(STEPS, 2, INPUT, dtype=dtype)
    output, _ = layer(x)
    expected, _ = layer.to_dense().double()(x.double())
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-6}[dtype]
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    assert layer.weight_hh_l0.raw_threshold.dtype.itemsize >= 4


@each_cell
def test_autocast(torch_class: type, path: str) -> None:
    layer = LOW_RANK[torch_class](INPUT, HIDDEN, 2, bidirectional=True)
    x, states = torch.randn(STEPS, 2, INPUT), states_of(torch_class, 4, 2, HIDDEN)
    expected, _ = layer(x, states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(x, states)
        output.float().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=5e-2)
    assert layer.weight_hh_l0.m.grad.abs().sum() > 0


@each_cell
def test_autocast_leaves_the_weights_to_torchs_kernel(torch_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the dtypes: a kernel that casts needs matrices and biases in one dtype."""
    kernel, dtypes = getattr(torch._VF, torch_class.__name__.lower()), set()

    def spy(x, hx, weights, *options):
        dtypes.update(weight.dtype for weight in weights)
        return kernel(x, hx, weights, *options)

    monkeypatch.setattr(torch._VF, torch_class.__name__.lower(), spy)
    set_path(monkeypatch, "dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        LOW_RANK[torch_class](INPUT, HIDDEN)(torch.randn(STEPS, 2, INPUT))
    assert dtypes == {torch.float32}
