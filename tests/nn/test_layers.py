"""Thresholded layers: torch's own, with the paper's formula in front of the weight."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from str_triton import STRConv1d, STRConv2d, STRConv3d, STREmbedding, STRLinear
from str_triton.nn import Control
from str_triton.nn.layers import STRLayer
from str_triton.nn.raw_threshold import new_raw_threshold
from tests import oracle

STR_CLASS = {
    nn.Conv1d: STRConv1d,
    nn.Conv2d: STRConv2d,
    nn.Conv3d: STRConv3d,
    nn.Linear: STRLinear,
    nn.Embedding: STREmbedding,
}
# Torch layer, its arguments, and the shape of an input (for an embedding, of the indices).
CASES = [
    (nn.Conv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}, (2, 4, 9)),
    (nn.Conv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": "same", "dilation": 2}, (2, 4, 9)),
    (
        nn.Conv1d,
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 2, "padding_mode": "circular", "groups": 4},
        (2, 4, 9),
    ),
    (nn.Conv2d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "bias": False}, (2, 4, 7, 6)),
    (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect"},
        (2, 4, 5, 4),
    ),
    (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2},
        (2, 4, 5, 4),
    ),
    (nn.Conv3d, {"in_channels": 2, "out_channels": 4, "kernel_size": 2, "dilation": 2, "groups": 2}, (1, 2, 4, 5, 4)),
    (
        nn.Conv3d,
        {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "zeros"},
        (1, 2, 3, 4, 3),
    ),
    (nn.Linear, {"in_features": 5, "out_features": 7}, (3, 2, 5)),
    (nn.Linear, {"in_features": 5, "out_features": 7, "bias": False}, (5,)),
    (nn.Embedding, {"num_embeddings": 6, "embedding_dim": 4}, (3, 5)),
    (nn.Embedding, {"num_embeddings": 6, "embedding_dim": 4, "padding_idx": 2, "scale_grad_by_freq": True}, (3, 5)),
    (nn.Embedding, {"num_embeddings": 6, "embedding_dim": 4, "max_norm": 0.7, "norm_type": 1.0}, (3, 5)),
]
IDS = [f"{cls.__name__}-{'-'.join(map(str, list(kwargs.values())[2:]))}" for cls, kwargs, _ in CASES]
every_layer = pytest.mark.parametrize(("cls", "kwargs", "shape"), CASES, ids=IDS)
ONE_OF_EACH = [CASES[i] for i in (0, 3, 6, 8, 10)]
one_of_each = pytest.mark.parametrize(
    ("cls", "kwargs", "shape"), ONE_OF_EACH, ids=[case[0].__name__ for case in ONE_OF_EACH]
)
# A raw threshold for each g that prunes some weights of all of these layers, and not all.
RAW = {"sigmoid": -2.0, "exp": -2.0, "softplus": -2.0, "identity": 0.1}


def example(cls: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(6, shape) if cls is nn.Embedding else torch.randn(shape, dtype=dtype)


def conv(**options) -> STRConv2d:
    return STRConv2d(3, 4, 3, **options)


# ---- what the forward computes ------------------------------------------------------------------------------------


def check_against_the_formula(cls, kwargs, shape, granularity: str, g: str, gradient: str) -> None:
    dense = cls(**kwargs, dtype=torch.float64)
    nn.init.normal_(dense.weight, std=0.2)
    layer = STR_CLASS[cls].from_dense(
        copy.deepcopy(dense), g=g, gradient=gradient, granularity=granularity, raw_threshold_init=RAW[g]
    )
    with torch.no_grad():
        layer.raw_threshold += 0.1 * torch.rand_like(layer.raw_threshold)  # so that a mix-up of filters shows
    x = example(cls, shape, torch.float64)

    raw = layer.raw_threshold.detach().clone().requires_grad_()
    formula = oracle.soft_threshold if gradient == "masked" else oracle.soft_threshold_straight_through
    expected = functional_call(dense, {"weight": formula(dense.weight, raw, g)}, x)
    torch.testing.assert_close(layer.sparse_weight, oracle.soft_threshold(layer.weight, raw, g))
    torch.testing.assert_close(layer.threshold, oracle.threshold(raw, g))
    assert 0 < (layer.sparse_weight == 0).sum() < layer.weight.numel()

    actual = layer(x)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(layer.raw_threshold.grad, raw.grad)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad)


@every_layer
@pytest.mark.parametrize("granularity", ["layer", "filter", "weight", "global"])
def test_every_layer_is_torchs_with_the_formula_before_it(cls, kwargs, shape, granularity):
    check_against_the_formula(cls, kwargs, shape, granularity, "exp", "straight_through")


@pytest.mark.parametrize("g", RAW)
@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
@pytest.mark.parametrize("granularity", ["layer", "filter", "weight"])
def test_every_threshold_function_and_gradient(granularity, g, gradient):
    for case in CASES[5], CASES[8]:
        check_against_the_formula(*case, granularity, g, gradient)


def test_max_norm_scales_thresholded_rows_and_never_rewrites_the_weight():
    layer = STREmbedding(6, 4, max_norm=0.5, g="identity", initial_threshold=0.2)
    before = layer.weight.detach().clone()
    norms = layer(torch.arange(6)).norm(dim=1)
    assert (norms <= 0.5 + 1e-5).all()
    assert (layer.sparse_weight.norm(dim=1) > 0.6).any()
    assert torch.equal(layer.weight, before)


# ---- direct construction ------------------------------------------------------------------------------------------


@every_layer
def test_direct_construction_takes_torchs_arguments(cls, kwargs, shape):
    torch.manual_seed(1)
    dense = cls(**kwargs)
    torch.manual_seed(1)
    layer = STR_CLASS[cls](**kwargs, g="exp", raw_threshold_init=-100.0)
    assert isinstance(layer, cls)
    x = example(cls, shape)
    assert torch.equal(layer(x), dense(x))
    own = {"g", "gradient"}
    state = {name: value for name, value in vars(layer).items() if name not in own and not name.startswith("_")}
    assert state == {name: value for name, value in vars(dense).items() if not name.startswith("_")}
    assert list(layer.state_dict()) == [*dense.state_dict(), "raw_threshold", "threshold_options"]


def test_positional_arguments_are_torchs():
    layer = STRConv2d(4, 6, 3, 2, 1, 1, 2, False, "circular", granularity="filter")
    assert (layer.stride, layer.groups, layer.padding_mode, layer.bias) == ((2, 2), 2, "circular", None)
    layer = STREmbedding(6, 4, 2, 0.7, 1.0, True)
    assert (layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq) == (2, 0.7, 1.0, True)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("layer", (1,)), ("global", (1,)), ("filter", (4, 1, 1, 1)), ("weight", (4, 3, 3, 3))],
)
def test_shape_of_the_raw_threshold(granularity, shape):
    assert conv(granularity=granularity).raw_threshold.shape == shape


@pytest.mark.parametrize("g", RAW)
def test_initial_threshold_is_in_units_of_the_weights(g):
    assert conv(g=g).threshold.item() == pytest.approx(1e-4, rel=1e-5)
    assert conv(g=g, initial_threshold=0.3).threshold.item() == pytest.approx(0.3, rel=1e-5)
    assert conv(g=g, raw_threshold_init=-3200).raw_threshold.item() == -3200


def test_defaults():
    layer = conv()
    assert (layer.g, layer.gradient, layer.raw_threshold.shape, layer.control) == (
        "exp",
        "straight_through",
        (1,),
        None,
    )
    assert (STRLinear.from_dense(nn.Linear(2, 2)).g, STRLinear.from_dense(nn.Linear(2, 2)).gradient) == (
        "exp",
        "straight_through",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"g": "relu"}, "got 'relu'"),
        ({"g": "relu", "raw_threshold_init": 0.0}, "got 'relu'"),
        ({"gradient": "ste"}, "got 'ste'"),
        ({"granularity": "channel"}, "got 'channel'"),
        ({"initial_threshold": 0.1, "raw_threshold_init": -3.0}, "initial_threshold=0.1 or raw_threshold_init=-3.0"),
        ({"g": "sigmoid", "initial_threshold": 1.0}, "initial_threshold=1.0 is not a value of g='sigmoid'"),
        ({"initial_threshold": 0.0}, "initial_threshold=0.0 is not a value of g='exp'"),
        ({"initial_threshold": -0.1}, "initial_threshold=-0.1"),
        ({"g": "identity", "initial_threshold": -0.1}, "initial_threshold=-0.1"),
        ({"initial_threshold": float("nan")}, "initial_threshold=nan"),
        ({"raw_threshold_init": float("-inf")}, "must be finite, got -inf"),
        ({"dtype": torch.complex64}, "complex64"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        conv(**options)
    if "dtype" not in options:
        with pytest.raises(ValueError, match=message):
            STRConv2d.from_dense(nn.Conv2d(3, 4, 3), **options)


def test_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="sparse=True"):
        STREmbedding(6, 4, sparse=True)
    with pytest.raises(ValueError, match="sparse=True"):
        STREmbedding.from_dense(nn.Embedding(6, 4, sparse=True))


# ---- from_dense and to_dense --------------------------------------------------------------------------------------


@every_layer
def test_from_dense_adopts_the_parameters(cls, kwargs, shape):
    dense = cls(**kwargs).eval()
    dense.register_buffer("mask", torch.ones(3))
    before = list(dense.state_dict())
    layer = STR_CLASS[cls].from_dense(dense)
    assert type(layer) is STR_CLASS[cls]
    assert layer.weight is dense.weight
    assert getattr(layer, "bias", None) is getattr(dense, "bias", None)
    assert layer.mask is dense.mask
    assert not layer.training
    assert list(dense.state_dict()) == before  # the dense layer stays as it is
    assert dense(example(cls, shape)).shape == layer(example(cls, shape)).shape
    assert set(dict(layer.named_parameters())) == {*dict(dense.named_parameters()), "raw_threshold"}


def test_from_dense_adopts_hooks_and_their_handles():
    dense = nn.Linear(2, 2)
    seen = []
    handle = dense.register_forward_hook(lambda module, args, output: seen.append(module))
    layer = STRLinear.from_dense(dense)
    layer(torch.ones(2))
    assert seen == [layer]
    handle.remove()
    layer(torch.ones(2))
    assert seen == [layer]


def test_from_dense_does_not_call_the_layer_that_was_compiled():
    dense = nn.Linear(2, 2)
    dense.compile(backend="eager")
    layer = STRLinear.from_dense(dense, initial_threshold=10.0)
    assert torch.equal(layer(torch.ones(2)), layer.bias)


@pytest.mark.parametrize("value", [0.0, -3.0])  # 0 is false
@pytest.mark.parametrize("shape", [(1,), (4, 1, 1, 1), (4, 3, 3, 3)])
def test_from_dense_shares_a_given_raw_threshold(value, shape):
    raw = nn.Parameter(torch.full(shape, value))
    first, second = (STRConv2d.from_dense(nn.Conv2d(3, 4, 3), raw) for _ in range(2))
    assert first.raw_threshold is raw
    assert second.raw_threshold is raw


@pytest.mark.parametrize(
    ("dense", "raw", "options", "error", "message"),
    [
        (nn.Conv1d(3, 4, 3), None, {}, TypeError, "STRConv2d.from_dense needs Conv2d, got Conv1d"),
        (conv(), None, {}, ValueError, "STRConv2d is thresholded already"),
        (nn.Conv2d(3, 4, 3), torch.zeros(1), {}, TypeError, "'raw_threshold'"),
        (nn.Conv2d(3, 4, 3), nn.Parameter(torch.zeros(3)), {}, ValueError, r"shape \(3,\) does not fit"),
        (nn.Conv2d(3, 4, 3), nn.Parameter(torch.zeros(1)), {"granularity": "layer"}, ValueError, "granularity"),
    ],
)
def test_from_dense_refuses_what_does_not_fit(dense, raw, options, error, message):
    with pytest.raises(error, match=message):
        STRConv2d.from_dense(dense, raw, **options)


@every_layer
def test_to_dense_gives_the_same_bits_and_leaves_the_layer_alone(cls, kwargs, shape):
    dense = cls(**kwargs)
    keys = list(dense.state_dict())
    layer = STR_CLASS[cls].from_dense(dense, g="identity", initial_threshold=0.1)
    layer.control = Control()
    weight, raw = layer.weight, layer.raw_threshold
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    plain = layer.to_dense()
    assert type(plain) is cls
    assert vars(plain).keys() == vars(dense).keys()
    assert list(plain.state_dict()) == keys
    x = example(cls, shape)
    assert torch.equal(plain(x), layer(x))
    with torch.no_grad():
        plain.weight.fill_(7.0)
    assert layer.weight is weight
    assert layer.raw_threshold is raw
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_to_dense_leaves_no_negative_zeros():
    """Their signs would have to be stored."""
    dense = STRLinear.from_dense(nn.Linear(32, 16), initial_threshold=0.1).to_dense()
    assert 0 < (dense.weight == 0).sum() == ((dense.weight == 0) & ~dense.weight.signbit()).sum()


@pytest.mark.parametrize("trainable", [True, False])
def test_to_dense_keeps_requires_grad(trainable):
    layer = STRLinear(3, 3)
    layer.weight.requires_grad_(trainable)
    plain = layer.to_dense()
    assert plain.weight.requires_grad == trainable
    assert plain.weight.is_leaf
    assert plain.bias is layer.bias


# ---- repr, copies, dtypes, devices --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_repr_says_what_the_layer_does():
    layer = STRConv2d(3, 4, 3, padding=1, bias=False, g="identity", gradient="masked", initial_threshold=0.1)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.05, 0.15, layer.weight.numel()).view_as(layer.weight))
    assert repr(layer) == (
        "STRConv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, "
        "g=identity, gradient=masked, threshold=0.1, sparsity=50.00 %)"
    )
    assert "threshold=0.0001, " in repr(STRLinear(3, 4))
    layer = STRLinear(3, 2, granularity="filter", g="identity")
    with torch.no_grad():
        layer.raw_threshold.copy_(torch.tensor([[0.0], [100.0]]))
    assert repr(layer).endswith("threshold=0 to 100, sparsity=50.00 %)")
    layer = STRLinear(768, 768, g="identity", initial_threshold=0.5)
    with torch.no_grad():
        layer.weight.zero_()[0, :29] = 1
    assert repr(layer).endswith("sparsity=99.995 %)")
    assert repr(STRLinear(3, 4, device="meta")).endswith("bias=True, g=exp, gradient=straight_through)")
    assert repr(STRLinear.from_dense(nn.Linear(0, 4))).endswith("gradient=straight_through)")


@one_of_each
def test_copies_and_pickles(cls, kwargs, shape):
    layer = STR_CLASS[cls].from_dense(cls(**kwargs), g="softplus", gradient="masked", initial_threshold=0.1)
    x = example(cls, shape)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert twin.weight is not layer.weight
        assert torch.equal(twin(x), layer(x))
        assert type(twin.to_dense()) is cls
        assert (twin.g, twin.gradient) == ("softplus", "masked")


@one_of_each
def test_state_dict_round_trip(cls, kwargs, shape):
    layer = STR_CLASS[cls](**kwargs, granularity="filter", initial_threshold=0.1)
    other = STR_CLASS[cls](**kwargs, granularity="filter")
    other.load_state_dict(layer.state_dict())
    x = example(cls, shape)
    assert torch.equal(other(x), layer(x))
    other = STR_CLASS[cls](**kwargs, granularity="filter", device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["layer", "filter", "weight"])
def test_a_cast_to_16_bits_leaves_the_raw_threshold_in_float32(dtype, granularity):
    layer = conv(g="sigmoid", raw_threshold_init=-20.123456, granularity=granularity)
    layer(torch.randn(1, 3, 4, 4)).sum().backward()
    raw, value, grad = layer.raw_threshold, layer.raw_threshold.detach().clone(), layer.raw_threshold.grad.clone()
    for cast in (lambda: layer.to(dtype), lambda: layer.to(dtype, memory_format=torch.channels_last)):
        nn.Sequential(cast())
        assert layer.weight.dtype == layer.weight.grad.dtype == dtype
        assert layer.raw_threshold is raw
        assert raw.dtype == raw.grad.dtype == torch.float32
        assert torch.equal(raw, value)
        assert torch.equal(raw.grad, grad)
    assert layer.threshold.min() > 0  # sigmoid(-20.1) is 0 in float16
    assert layer.sparse_weight.dtype == dtype
    out = layer(torch.randn(1, 3, 4, 4, dtype=dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert raw.grad.dtype == torch.float32


def test_casts_of_a_model_and_back():
    model = nn.Sequential(conv())
    value = model[0].raw_threshold.detach().clone()
    assert model.half().float()[0].raw_threshold.equal(value)
    assert model.double()[0].raw_threshold.dtype == torch.float64
    assert model.bfloat16()[0].raw_threshold.dtype == torch.float32
    assert model[0].raw_threshold.item() == value.item()
    assert STRLinear(2, 2, dtype=torch.bfloat16).raw_threshold.dtype == torch.float32
    assert STRLinear(2, 2, dtype=torch.float64).raw_threshold.dtype == torch.float64
    assert STRLinear.from_dense(nn.Linear(2, 2).half()).raw_threshold.dtype == torch.float32


def test_meta_device():
    with torch.device("meta"):
        layer = conv(granularity="filter", initial_threshold=0.01)
        linear = STRLinear.from_dense(nn.Linear(3, 2))
    assert layer.raw_threshold.is_meta
    assert layer(torch.empty(1, 3, 5, 5, device="meta")).shape == (1, 4, 3, 3)
    assert linear(torch.empty(1, 3, device="meta")).is_meta
    assert layer.half().raw_threshold.dtype == torch.float32
    real = layer.to_empty(device="cpu")
    real.load_state_dict(conv(granularity="filter").state_dict())
    assert real.weight.dtype == torch.float16
    assert real.raw_threshold.dtype == torch.float32
    assert real.threshold.mean().item() == pytest.approx(1e-4, rel=1e-4)
    assert type(conv(device="meta").to_dense()) is nn.Conv2d
    assert new_raw_threshold(torch.empty(2, 3, device="meta"), granularity="weight").shape == (2, 3)


@one_of_each
def test_autocast(cls, kwargs, shape):
    layer = STR_CLASS[cls](**kwargs, g="exp", initial_threshold=0.1)
    x = example(cls, shape)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        expected = layer.to_dense()(x)
    assert torch.equal(out, expected)
    assert out.dtype == (torch.float32 if cls is nn.Embedding else torch.bfloat16)
    out.sum().backward()
    assert layer.raw_threshold.grad.dtype == torch.float32
    assert layer.raw_threshold.grad.isfinite().all()


@one_of_each
def test_replicas_of_data_parallel_hold_plain_tensors(cls, kwargs, shape):
    layer = STR_CLASS[cls](**kwargs, initial_threshold=0.1)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():  # as torch.nn.parallel.replicate does
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1)
    x = example(cls, shape)
    assert torch.equal(replica(x), layer(x))


@pytest.mark.parametrize("g", RAW)
@pytest.mark.parametrize("granularity", ["layer", "filter", "weight"])
def test_pruning_offsets_are_where_weights_begin_to_be_pruned(g, granularity):
    layer = STRLinear(6, 5, g=g, granularity=granularity, raw_threshold_init=RAW[g], dtype=torch.float64)
    offsets = layer.pruning_offsets()
    assert offsets.shape == layer.weight.shape
    assert not offsets.requires_grad
    offset = offsets.median()
    with torch.no_grad():
        layer.raw_threshold += offset + 1e-9
        assert torch.equal(layer.sparse_weight == 0, offsets <= offset)
        layer.weight.zero_()
        assert (layer.pruning_offsets() <= -layer.raw_threshold).all()  # a zero is pruned by any threshold


def test_every_class_names_its_torch_layer():
    assert all(cls.dense_class is dense and issubclass(cls, STRLayer) for dense, cls in STR_CLASS.items())
