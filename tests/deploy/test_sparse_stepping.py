"""Single time steps in C: steps are the sequence, sequences of a batch begin when they like, wrong arguments."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor, nn

from str_triton import LowRankFastGRNN, LowRankGRU, LowRankLSTM, deploy
from str_triton.deploy.sparse import stepping
from tests.deploy.recurrent_networks import HIDDEN, INPUTS, OUTPUTS, Classifier

pytestmark = pytest.mark.usefixtures("kernels")

STEPS = 9
MODELS = {
    "gru": lambda: LowRankGRU(INPUTS, HIDDEN, ranks={"weight_hh_l0": 3, "weight_ih_l0": 2}),
    "gru, large": lambda: LowRankGRU(37, 70, ranks={"weight_hh_l0": 33}, bias=False),
    "lstm": lambda: LowRankLSTM(INPUTS, HIDDEN, 2, ranks={"weight_hh_l1": 3}),
    "fastgrnn": lambda: LowRankFastGRNN(INPUTS, HIDDEN, 2, ranks={"weight_hh_l0": 3}),
    "nn.GRU": lambda: nn.GRU(INPUTS, HIDDEN, 2),
    "nn.LSTM": lambda: nn.LSTM(INPUTS, HIDDEN),
    "classifier": lambda: Classifier(LowRankGRU(INPUTS, HIDDEN, ranks={"weight_hh_l0": 3})),
    "classifier, mean": lambda: Classifier(LowRankLSTM(INPUTS, HIDDEN, batch_first=True, max_rank=3), "mean"),
}


def whole(model: nn.Module, x: Tensor) -> Tensor:
    """Return the output after the last step of sequences [T, B, features], in float64."""
    double = copy.deepcopy(model).double().eval()
    first = getattr(double, "rnn", double).batch_first
    with torch.no_grad():
        found = double((x.transpose(0, 1) if first else x).double())
    return found[0][-1] if isinstance(found, tuple) else found


@pytest.fixture(params=["C", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(stepping, "library", lambda: None)
    return request.param


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_sequence(name: str, by: str):
    model = MODELS[name]().eval()
    compiled = deploy.compile_step(model)
    for batch in (1, 5):
        x = torch.randn(STEPS, batch, compiled.inputs)
        state, changed = None, compiled.begin(batch)
        output = torch.full((batch, compiled.outputs), float("nan"))
        for frame in x:
            found, state = compiled.step(frame, state)
            assert torch.equal(compiled.step_(frame, changed, output), found)
        assert torch.equal(changed, state)
        torch.testing.assert_close(found.double(), whole(model, x), rtol=0, atol=2e-6)


def rounded(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scale).round() * scale


@torch.no_grad()
def with_int8(model: nn.Module) -> nn.Module:
    """Return a copy whose recurrent matrices hold the numbers that int8 weights stand for."""
    model = copy.deepcopy(model)
    for layer in range(model.num_layers):
        own = getattr(model, f"weight_hh_l{layer}")
        if isinstance(own, nn.Parameter):
            own.copy_(rounded(own))
        else:
            scale = own.v.abs().amax(0) / 127
            own.v.copy_(rounded(own.v.t()).t())
            own.u.copy_(rounded(own.u * scale) / scale)
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["gru, large", "lstm", "nn.GRU"])
def test_int8_weights(name: str, by: str):
    model = MODELS[name]().eval()
    compiled = deploy.compile_step(model, int8=True)
    x, state = torch.randn(STEPS, 5, compiled.inputs), None
    for frame in x:
        found, state = compiled.step(frame, state)
    wanted = whole(with_int8(model), x)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6 if by == "torch" else 5e-5)
    assert (wanted - whole(model, x)).abs().max() > 1e-4
    assert torch.equal(copy.deepcopy(compiled).step(x[0])[0], compiled.step(x[0])[0])


def test_a_sequence_begins_anew_beside_others(by: str):
    model = MODELS["classifier, mean"]().eval()
    compiled = deploy.compile_step(model)
    x, state = torch.randn(STEPS, 3, INPUTS), compiled.begin(3)
    for time, frame in enumerate(x):
        if time == 4:
            state[:, 1] = 0
        found, state = compiled.step(frame, state)
    torch.testing.assert_close(found[1:2].double(), whole(model, x[4:, 1:2]), rtol=0, atol=2e-6)
    torch.testing.assert_close(found[::2].double(), whole(model, x[:, ::2]), rtol=0, atol=2e-6)


def test_views_copies_and_empty_batches():
    compiled = deploy.compile_step(MODELS["lstm"]())
    x, state = torch.randn(4, INPUTS), torch.randn(compiled.rows, 4, HIDDEN)
    found = compiled.step(x, state)
    strided = x.t().contiguous().t(), state.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, compiled.step(*strided), found))
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert all(map(torch.equal, other.step(x, state), found))
    empty = compiled.step(x[:0])
    assert [tuple(part.shape) for part in empty] == [(0, HIDDEN), (compiled.rows, 0, HIDDEN)]


def test_frames_and_states_without_memory_are_refused():
    compiled = deploy.compile_step(MODELS["gru"]())
    x, state = torch.randn(2, INPUTS), compiled.begin(2)
    freed = torch.randn(2, INPUTS)
    freed.untyped_storage().resize_(0)
    for wrong in ((freed, state), (torch._efficientzerotensor(x.shape), state)):
        with pytest.raises(ValueError, match="are not in memory"):
            compiled.step(*wrong)


def test_wrong_arguments():
    compiled = deploy.compile_step(MODELS["classifier"]())
    x, state, output = torch.randn(2, INPUTS), compiled.begin(2), torch.empty(2, OUTPUTS)
    for bad in (x[:, 1:], x.double(), torch.randn(2, 3, INPUTS), x.to("meta"), x[0, 0]):
        with pytest.raises(ValueError, match=rf"x must be float32 \[[02], {INPUTS}\] on the CPU"):
            compiled.step(bad, state)
    for bad in (state[:, :1], state[..., 1:], state.double(), state[:0]):
        with pytest.raises(ValueError, match="state must be float32"):
            compiled.step_(x, bad, output)
    with pytest.raises(ValueError, match=r"output must be float32 \[2, 4\]"):
        compiled.step_(x, state, output[:1])
    with pytest.raises(ValueError, match="contiguous"):
        compiled.step_(x, state, torch.empty(OUTPUTS, 2).t())
    with pytest.raises(ValueError, match="bidirectional"):
        deploy.compile_step(nn.GRU(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match="recurrent layers"):
        deploy.compile_step(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="str"):
        deploy.compile_step("model")
    made = deploy.quantize(nn.Linear(INPUTS, 3).eval(), [torch.randn(2, INPUTS)])
    with pytest.raises(TypeError, match=r"QuantizedModel.*int8=True"):
        deploy.compile_step(made)
    model = nn.GRU(INPUTS, HIDDEN)
    with torch.no_grad():
        model.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        deploy.compile_step(model, int8=True)


def test_a_wrong_step_is_not_used(monkeypatch: pytest.MonkeyPatch):
    """If the compiled step gives other values than torch, torch runs it, and a warning says so."""
    exact = stepping._layer

    def wrong(rnn: LowRankGRU, index: int) -> stepping.StackedLayer:
        layer = exact(rnn, index)
        return dataclasses.replace(layer, bias=layer.bias + 1e-2)

    monkeypatch.setattr(stepping, "_layer", wrong)
    model = nn.GRU(INPUTS, HIDDEN)
    with pytest.warns(UserWarning, match="other values than torch"):
        compiled = deploy.compile_step(model)
    x = torch.randn(1, 2, INPUTS)
    torch.testing.assert_close(compiled.step(x[0])[0].double(), whole(model, x), rtol=0, atol=1e-6)
