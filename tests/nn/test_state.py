"""State dicts of sparsified models: never taken for plain ones, loaded into the right model, turned into plain ones."""

import copy
import io

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from str_triton import LowRankLinear, SparsityController, Target, densify, plain_state_dict, sparsify
from str_triton.nn import thresholded_weights
from tests.nn.test_surgery import MODELS, TiedText, every_model, small

OPTIONS = {"g": "identity", "initial_threshold": 0.1}
SUFFIXES = ("raw_threshold", "threshold_options")


class Mixed(nn.Module):
    """A layer of each way, one in factors, and an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.gru = nn.GRU(6, 6)
        self.low_rank = LowRankLinear(6, 6, raw_threshold_init=-2.0)
        self.up = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x):
        return self.low_rank(self.gru(self.linear(x))[0]) @ self.up[0]


def saved(model: nn.Module) -> dict:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in thresholded_weights(model):
            weight.dense.add_(0.01)
            weight.raw.add_(0.01 * torch.rand_like(weight.raw))
    return model


@every_model
@pytest.mark.parametrize("granularity", ["layer", "filter", "weight", "global"])
def test_a_state_dict_comes_back_and_is_the_densified_one_without_its_model(build, example, granularity):
    plain = build().eval()
    first = sparsify(copy.deepcopy(plain), granularity=granularity, **OPTIONS)
    model, other = changed(copy.deepcopy(first)), copy.deepcopy(first)
    state = saved(model)
    other.load_state_dict(state, strict=True)
    x = example()
    assert torch.equal(other(x), model(x))
    assert not torch.equal(other(x), first(x))
    converted = plain_state_dict(state)
    expected = densify(copy.deepcopy(model)).state_dict()
    assert list(converted) == list(expected) == list(plain.state_dict())
    assert all(torch.equal(converted[key], expected[key]) for key in expected)
    assert not any(t.signbit()[t == 0].any() for t in converted.values())


@every_model
@pytest.mark.parametrize("granularity", ["layer", "global"])
def test_no_plain_model_takes_it(build, example, granularity):
    state = sparsify(build(), granularity=granularity).state_dict()
    keys = {key for key in state if not key.endswith(SUFFIXES)}
    plain = build()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="size mismatch"):
            plain.load_state_dict(state, strict=strict)
    assert keys == set(plain.state_dict())


@every_model
def test_a_plain_state_dict_leaves_the_thresholds_as_they_are(build, example):
    state = {name: value + (0.01 if value.is_floating_point() else 1) for name, value in build().state_dict().items()}
    model = sparsify(build(), **OPTIONS)
    assert not any(model.load_state_dict(state, strict=True))
    assert all(weight.raw.item() == pytest.approx(0.1) for weight in thresholded_weights(model))
    for key, value in model.state_dict(keep_vars=True).items():
        if not key.endswith(SUFFIXES):
            assert torch.equal(value, state[key])


def test_keep_vars_gives_the_parameters():
    model = sparsify(Mixed(), parameters="up")
    state = model.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in model.parameters()}
    assert {id(value) for key, value in state.items() if not key.endswith("options")} == parameters
    assert state["gru.weight_hh_l0"].shape == (18, 6)
    assert model.state_dict()["gru.weight_hh_l0"].shape == (1, 18, 6)


def test_the_values_in_a_state_dict_are_the_models_own():
    """As torch's own; averages of the weights are written through them."""
    model = sparsify(Mixed(), parameters="up")
    for key, value in model.state_dict().items():
        if not key.endswith("options"):
            value.fill_(1.0)
    assert all((weight.dense == 1).all() and (weight.raw == 1).all() for weight in thresholded_weights(model))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "key", ["linear.", "gru.parametrizations.weight_hh_l0.0.", "low_rank.weight.", "parametrizations.up.0."]
)
def test_another_g_is_an_error(key, strict):
    model, other = sparsify(Mixed(), parameters="up"), sparsify(Mixed(), parameters="up", g="softplus")
    state = {name: value for name, value in other.state_dict().items() if not name.startswith("low_rank")}
    state = model.state_dict() | {name: value for name, value in state.items() if name.startswith(key)}
    if key.startswith("low_rank"):
        state |= LowRankLinear(6, 6, g="softplus").state_dict(prefix="low_rank.")
    with pytest.raises(RuntimeError, match=f"'{key}raw_threshold' .*g='softplus'.* g='exp'"):
        model.load_state_dict(state, strict=strict)


def test_another_gradient_is_none():
    sparsify(small(), gradient="masked").load_state_dict(sparsify(small()).state_dict())
    shapes = [
        {k: v.shape for k, v in sparsify(small(), gradient=g).state_dict().items()}
        for g in ("masked", "straight_through")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "options",
    [None, torch.zeros(64), torch.zeros(64, dtype=torch.uint8), torch.tensor([103, 61, 120], dtype=torch.uint8)],
)
def test_options_that_are_missing_or_damaged(options):
    model = sparsify(small())
    state = model.state_dict()
    del state["0.threshold_options"]
    if options is not None:
        state["0.threshold_options"] = options
    message = "nothing says which g" if options is None else "does not name a g"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=message) as error:
        plain_state_dict(state)
    assert "\n" not in str(error.value)


def test_missing_keys_are_reported():
    model = sparsify(Mixed(), parameters="up")
    for missing in ("linear.raw_threshold", "gru.parametrizations.weight_hh_l0.0.raw_threshold", "gru.weight_ih_l0"):
        state = {key: value for key, value in model.state_dict().items() if key != missing}
        assert model.load_state_dict(state, strict=False).missing_keys == [missing]
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(state)
    state = model.state_dict() | {"gru.weight_hh_l1": torch.ones(2)}
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["gru.weight_hh_l1"]


@pytest.mark.parametrize("granularity", ["layer", "global"])
def test_safetensors_takes_tied_models(granularity, tmp_path):
    model = changed(sparsify(TiedText(), granularity=granularity, **OPTIONS))
    state = model.state_dict()
    places = [
        t.untyped_storage().data_ptr() for key, t in state.items() if not key.startswith(("again", "decoder.weight"))
    ]
    assert len(places) == len(set(places))
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    other = sparsify(TiedText(), granularity=granularity, **OPTIONS)
    safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    tokens = torch.randint(9, (5, 2))
    assert torch.equal(other(tokens), model(tokens))
    # Its file has one name of each tied weight.
    plain = plain_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    expected = densify(model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in plain.items())


def test_assigned_tensors():
    model = sparsify(Mixed(), parameters="up")
    state = {key: value.clone() for key, value in changed(copy.deepcopy(model)).state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model.gru.parametrizations.weight_hh_l0.original.data_ptr() == state["gru.weight_hh_l0"].data_ptr()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert [name for name, _ in model.gru.named_parameters(recurse=False)] == ["bias_ih_l0", "bias_hh_l0"]
    model(torch.randn(3, 2, 6)).sum().backward()


def test_the_meta_device_leaves_no_garbage():
    with torch.device("meta"):
        model = sparsify(Mixed(), parameters="up", initial_threshold=0.05)
    model.to_empty(device="cpu")
    for weight in thresholded_weights(model):
        assert weight.raw.exp().item() == pytest.approx(0.05)
    assert model.low_rank.weight.raw_threshold.item() == -2
    halves = sparsify(nn.Linear(3, 2, device="meta")).half().to_empty(device="cpu")
    assert halves.raw_threshold.dtype == torch.float32
    assert halves.threshold.item() == pytest.approx(1e-4)
    with torch.no_grad():
        model.linear.raw_threshold.fill_(7)
    model.linear.reset_parameters()
    assert model.linear.threshold.item() == pytest.approx(0.05)


def test_assigned_thresholds_stay_with_their_controller():
    state = sparsify(TiedText(), initial_threshold=0.3).state_dict()
    model = sparsify(TiedText())
    raw = model.lstm.parametrizations.weight_hh_l0[0].raw_threshold
    controller = SparsityController(model, Target(sparsity=0.8))
    model.load_state_dict(state, assign=True)
    assert model.lstm.parametrizations.weight_hh_l0[0].raw_threshold is raw
    assert raw.exp().item() == pytest.approx(0.3)
    model.decoder.weight = model.embedding.weight
    controller.finish()
    weights = {id(weight.dense): weight for weight in thresholded_weights(model)}.values()
    assert sum(int((weight.sparse == 0).sum()) for weight in weights) == round(
        0.8 * sum(weight.dense.numel() for weight in weights)
    )


def test_to_empty_twice_leaves_no_garbage():
    """It comes to a module with two parents once for each."""
    with torch.device("meta"):
        child = nn.Linear(3, 3)
        model = sparsify(nn.Sequential(nn.Sequential(child), nn.Sequential(child)), initial_threshold=0.05)
    assert model.to_empty(device="cpu")[0][0].threshold.item() == pytest.approx(0.05)
    with torch.no_grad():
        child.raw_threshold.fill_(0.7)
    assert child.double().float().raw_threshold.item() == torch.tensor(0.7).item()


@pytest.mark.parametrize("granularity", ["layer", "global"])
@pytest.mark.parametrize("fill", ["to_empty", "assign"])
def test_leaving_the_meta_device_keeps_shared_thresholds(granularity, fill):
    state = sparsify(TiedText(), granularity=granularity).state_dict()
    with torch.device("meta"):
        model = sparsify(TiedText(), granularity=granularity)
    kinds = len({id(weight.raw) for weight in thresholded_weights(model)})
    if fill == "to_empty":
        model.to_empty(device="cpu").load_state_dict(state)
    else:
        model.load_state_dict(state, assign=True)
    assert model.decoder.raw_threshold is model.embedding.raw_threshold
    assert not model.decoder.raw_threshold.is_meta
    assert len({id(weight.raw) for weight in thresholded_weights(model)}) == kinds
    assert len({id(weight.raw) for weight in thresholded_weights(copy.deepcopy(model))}) == kinds


def test_a_matrix_in_factors_becomes_its_compact_form():
    layer = LowRankLinear(9, 8)
    with torch.no_grad():
        layer.weight.raw_threshold.fill_(layer.weight.singular_values().sort().values[-3].log())
    plain = plain_state_dict(layer.state_dict())
    compact = layer.compact()
    assert list(plain) == list(compact.state_dict())
    assert all(torch.equal(plain[key], value) for key, value in compact.state_dict().items())
    dense = plain_state_dict(LowRankLinear(9, 8).state_dict())
    assert dense["weight"].shape == (8, 9)


def test_a_plain_state_dict_is_unchanged():
    state = MODELS["encoder"][0]().state_dict()
    assert plain_state_dict(state) == state
    with pytest.raises(TypeError, match=r"pass model\.state_dict\(\)"):
        plain_state_dict(nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 2)}, "'weight' is of shape"),
        ({"weight": torch.ones(())}, "'weight' is of shape"),
        ({"weight": torch.ones(1, 3, 2, dtype=torch.int64)}, "'weight' does not fit"),
        ({"raw_threshold": torch.ones(5)}, "'weight' does not fit"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        plain_state_dict(sparsify(nn.Linear(2, 3)).state_dict() | change)


def test_thresholds_of_single_layers_do_not_load_as_one_for_all():
    """The last one would win, and the model would be another."""

    def network(granularity: str) -> nn.Module:
        return sparsify(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)), granularity=granularity)

    single, shared = network("layer"), network("global")
    with pytest.raises(RuntimeError, match="one threshold for several"):
        shared.load_state_dict(single.state_dict())
    single.load_state_dict(shared.state_dict())
    shared.load_state_dict(network("global").state_dict())


def test_a_weight_that_other_code_computes_is_named():
    model = sparsify(nn.Sequential(nn.Linear(4, 4)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="weight of '0' is no plain Parameter any more"):
        model.state_dict()
    prune.remove(model[0], "weight")
    assert model.state_dict()["0.weight"].count_nonzero() == 8


def test_functional_call_refuses_the_state_of_another_g():
    layer, other = sparsify(nn.Linear(3, 3)), sparsify(nn.Linear(3, 3), g="sigmoid")
    with pytest.raises(ValueError, match="sigmoid"):
        torch.func.functional_call(layer, other.state_dict(), torch.zeros(1, 3))
