"""sparsify and densify on whole models: what they change, what they leave, and what they refuse."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from str_triton import (
    STRConv1d,
    STRConv2d,
    STRConv3d,
    STREmbedding,
    STRLinear,
    densify,
    parameter_groups,
    sparsify,
)
from str_triton.nn import matrices, str_layers, thresholded_weights
from tests import oracle


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Dropout(0.2)])
        self.heads = nn.ModuleDict({"fc": nn.Linear(8, 5)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["fc"](x.mean((2, 3)))


class TiedText(nn.Module):
    """The decoder has the embedding's weight, the middle layer is registered twice, and an LSTM runs between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.middle = nn.Linear(6, 6)
        self.lstm = nn.LSTM(6, 6)
        self.again = self.middle
        self.decoder = nn.Linear(6, 9)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.again(self.lstm(self.middle(self.embedding(tokens)))[0]))


class Attention(nn.Module):
    """nn.MultiheadAttention, which reads the weight of its child out_proj."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def image() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def tokens() -> Tensor:
    return torch.randint(9, (5, 2))


def sequence() -> Tensor:
    return torch.randn(2, 5, 8)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convnet": (ConvNet, image),
    "tied": (TiedText, tokens),
    "attention": (Attention, sequence),
    "attention-kdim": (lambda: Attention(kdim=8, vdim=8, bias=False), sequence),
    "encoder": (encoder, sequence),
    "encoder-norm-first": (lambda: encoder(norm_first=True, activation="gelu"), sequence),
    "decoder": (Decoder, sequence),
}
every_model = pytest.mark.parametrize(("build", "example"), MODELS.values(), ids=MODELS)
ATTENTION = [name for name in MODELS if name.startswith(("attention", "encoder", "decoder"))]
every_attention = pytest.mark.parametrize(("build", "example"), [MODELS[name] for name in ATTENTION], ids=ATTENTION)
OPTIONS = {"g": "identity", "initial_threshold": 0.1}  # prunes some weights of every layer, and not all


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


def literally_thresholded(model: nn.Module) -> nn.Module:
    """The plain model, with the formula's values in the place of its weights."""
    model = copy.deepcopy(model)
    for matrix in matrices(model):
        (weight,) = matrix.sources
        weight.data.copy_(oracle.soft_threshold(weight.data, torch.tensor(0.1), "identity"))
    return model


# ---- what sparsify changes ----------------------------------------------------------------------------------------


@every_model
def test_sparsify_works_in_place_and_keeps_every_object(build, example):
    model = build().eval()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert sparsify(model) is model
    assert all(new is modules[name] for name, new in model.named_modules() if "parametrizations" not in name)
    adopted = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    assert all(adopted[name] is parameter for name, parameter in parameters.items())
    assert [key for key in model.state_dict() if not key.endswith(("raw_threshold", "threshold_options"))] == keys
    assert not any(module.training for module in model.modules())
    assert {id(weight.dense) for weight in thresholded_weights(model)} == {
        id(source) for matrix in matrices(model) for source in matrix.sources
    }
    assert model(example()).isfinite().all()


def plain_name(name: str) -> str:
    """The name of a parameter before `sparsify`."""
    return name.replace("parametrizations.", "").replace(".original", "")


def test_layers_of_torch_become_layers_of_ours():
    model = nn.ModuleList([nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.Linear(2, 2)])
    model.extend([nn.Embedding(2, 2), nn.BatchNorm1d(2)])
    sparsify(model)
    assert [type(module) for module in model] == [
        STRConv1d,
        STRConv2d,
        STRConv3d,
        STRLinear,
        STREmbedding,
        nn.BatchNorm1d,
    ]


def test_a_bare_layer_is_returned_as_a_new_module():
    dense = nn.Conv2d(3, 4, 3)
    layer = sparsify(dense)
    assert type(layer) is STRConv2d
    assert type(dense) is nn.Conv2d
    assert layer.weight is dense.weight
    plain = densify(layer)
    assert type(plain) is nn.Conv2d
    assert type(layer) is STRConv2d
    assert layer.weight is dense.weight


def test_defaults_and_options():
    for layer in str_layers(sparsify(small())).values():
        assert (layer.g, layer.gradient, layer.raw_threshold.shape) == ("exp", "straight_through", (1,))
        assert layer.threshold.item() == pytest.approx(1e-4, rel=1e-5)
    model = sparsify(small(), g="sigmoid", gradient="masked", raw_threshold_init=-3200)
    for layer in str_layers(model).values():
        assert (layer.g, layer.gradient, layer.raw_threshold.item()) == ("sigmoid", "masked", -3200)


@pytest.mark.parametrize(
    ("granularity", "shapes"),
    [
        ("layer", [(1,), (1,)]),
        ("filter", [(4, 1, 1, 1), (2, 1)]),
        ("weight", [(4, 3, 3, 3), (2, 4)]),
        ("global", [(1,), (1,)]),
    ],
)
def test_granularity(granularity, shapes):
    model = sparsify(small(), granularity=granularity, initial_threshold=0.05)
    raws = [layer.raw_threshold for layer in str_layers(model).values()]
    assert [raw.shape for raw in raws] == shapes
    assert (raws[0] is raws[1]) == (granularity == "global")
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    assert all(raw.grad.abs().sum() > 0 for raw in raws)


def test_hooks_handles_and_references_from_before_still_hold():
    model = small()
    conv, calls = model[0], []
    handle = conv.register_forward_hook(lambda module, args, output: calls.append(module))
    conv.register_load_state_dict_pre_hook(lambda module, *args: calls.append(module))
    sparsify(model, initial_threshold=0.1)
    model(torch.randn(1, 3, 3, 3))
    assert calls == [conv]
    assert conv.raw_threshold is model[0].raw_threshold
    model.load_state_dict(model.state_dict())
    assert calls == [conv, conv]
    densify(model)
    handle.remove()
    model(torch.randn(1, 3, 3, 3))
    assert calls == [conv, conv]
    assert type(conv) is nn.Conv2d


# ---- which layers -------------------------------------------------------------------------------------------------

NAMES = ["stem.0", "blocks.0", "heads.fc"]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("stem.*", ["stem.0"]),
        (["stem.*", "heads.fc"], ["stem.0", "heads.fc"]),
        (("*.0",), ["stem.0", "blocks.0"]),
        (lambda name, module: isinstance(module, nn.Conv2d) and name.startswith("b"), ["blocks.0"]),
        ("blocks.0", ["blocks.0"]),
    ],
)
@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_include_and_exclude(kind, which, expected):
    model = sparsify(ConvNet(), **{kind: iter(which) if isinstance(which, tuple) else which})
    others = [name for name in NAMES if name not in expected]
    assert list(str_layers(model)) == (expected if kind == "include" else others)


def test_include_and_exclude_together_and_by_module():
    model = ConvNet()
    assert list(str_layers(sparsify(model, include="*.0", exclude="stem.*"))) == ["blocks.0"]
    model = ConvNet()
    assert list(str_layers(sparsify(model, exclude=model.stem))) == ["blocks.0", "heads.fc"]
    model = ConvNet()
    assert list(str_layers(sparsify(model, include=[model.stem[0], "heads.*"]))) == ["stem.0", "heads.fc"]
    assert list(str_layers(sparsify(ConvNet(), exclude=[]))) == NAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "stem"}, "'stem' .*include"),
        ({"exclude": ["stem.*", "head"]}, "'head' .*exclude"),
        ({"exclude": nn.Linear(2, 2)}, "Linear .*exclude"),
        ({"include": []}, "include and exclude .*3 weights"),
        ({"exclude": "*"}, "include and exclude .*3 weights"),
        ({"include": lambda name, module: False}, "include .*3 weights"),
        ({"parameters": ["*.bias", "stem.*"]}, r"'\*\.bias' .*parameters"),
        ({"granularity": "channel"}, "got 'channel'"),
        ({"g": "relu"}, "got 'relu'"),
        ({"gradient": "ste"}, "got 'ste'"),
        ({"g": "sigmoid", "initial_threshold": 1.5}, "initial_threshold=1.5 .*g='sigmoid'"),
    ],
)
def test_errors_leave_the_model_as_it_was(options, message):
    model = ConvNet()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message) as error:
        sparsify(model, **options)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == classes


def test_nothing_to_sparsify():
    with pytest.raises(ValueError, match="nothing to sparsify: Sequential"):
        sparsify(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)))


def test_a_second_sparsify_says_so():
    model = sparsify(small(), include="0")
    with pytest.raises(ValueError, match="sparsified already: densify"):
        sparsify(model, include="3")
    sparsify(densify(model))
    assert list(str_layers(model)) == ["0", "3"]
    with pytest.raises(ValueError, match="sparsified already"):
        sparsify(STRLinear(2, 2))


# ---- what is refused ----------------------------------------------------------------------------------------------


class Renamed(nn.Linear):
    """A subclass that computes as torch's layer does."""


class OwnLookup(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def parametrized_bias() -> nn.Module:
    layer = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus())
    return layer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (parametrized_bias, "it is parametrized already"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "no plain Parameter"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)), "no plain Parameter"),
        (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), "no plain Parameter"),
        (lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5), "no plain Parameter"),
        (lambda: nn.LazyLinear(2), "lazy.*call the model once"),
        (lambda: nn.Embedding(3, 2, sparse=True), "sparse=True"),
        (lambda: nn.EmbeddingBag(3, 2, sparse=True), "sparse=True"),
        (lambda: nn.EmbeddingBag(3, 2, max_norm=1.0), "max_norm"),
        (lambda: OwnLookup(3, 2, max_norm=1.0), "max_norm"),
        (lambda: nn.Conv1d(2, 2, 1, dtype=torch.complex64), "complex64"),
    ],
)
def test_layers_that_cannot_be_thresholded_are_refused_by_name(build, reason):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(build()))
    with pytest.raises(ValueError, match=rf"^cannot be thresholded: 1\.0.*{reason}.*exclude=\['1\.0'\]"):
        sparsify(model)
    assert type(model[0]) is nn.Linear
    assert list(str_layers(sparsify(model, exclude="1.0"))) == ["0"]


def test_all_refusals_come_at_once():
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2), nn.Embedding(3, 2, sparse=True), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"0, 3 \(.*2 \(sparse=True.*exclude=\['0', '3', '2'\]"):
        sparsify(model)
    tied = TiedText()
    tied.other = nn.Linear(6, 9)
    tied.other.weight = tied.embedding.weight
    with pytest.raises(ValueError, match=r"decoder .*embedding.* other .*exclude=\['decoder', 'embedding', 'other'\]"):
        sparsify(tied, exclude="embedding")


def test_a_subclass_without_a_forward_of_its_own_comes_back():
    model = sparsify(nn.Sequential(Renamed(2, 2)))
    assert type(model[0]) is STRLinear
    assert type(densify(model)[0]) is Renamed


# ---- shared weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "filter", "weight"])
def test_modules_that_share_a_weight_share_one_threshold(granularity):
    model = sparsify(TiedText(), granularity=granularity)
    assert type(model.embedding) is STREmbedding
    assert model.decoder.weight is model.embedding.weight
    assert model.decoder.raw_threshold is model.embedding.raw_threshold
    assert model.again is model.middle
    assert model.middle.raw_threshold is not model.decoder.raw_threshold
    assert sum("raw_threshold" in name for name, _ in model.named_parameters()) == 4  # of the LSTM's weights two
    model(tokens()).sum().backward()
    assert model.decoder.raw_threshold.grad.abs().sum() > 0
    twin = copy.deepcopy(model)
    assert twin.decoder.raw_threshold is twin.embedding.raw_threshold
    assert twin.half().decoder.raw_threshold is twin.embedding.raw_threshold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "embedding"}, "decoder .*embedding"),
        ({"exclude": "decoder"}, "embedding .*decoder"),
        ({"include": "decoder"}, "decoder .*embedding"),
        ({"exclude": "again"}, "middle .*again"),
        ({"exclude": "middle"}, "again .*middle"),
    ],
)
def test_a_shared_weight_is_thresholded_everywhere_or_nowhere(options, message):
    model = TiedText()
    with pytest.raises(ValueError, match=f"{message}: .*include.* exclude"):
        sparsify(model, **options)
    assert not str_layers(model)


def test_a_weight_shared_with_a_module_that_stays_dense_is_refused():
    model = nn.ModuleDict({"linear": nn.Linear(3, 4)})
    model.register_parameter("table", model["linear"].weight)
    with pytest.raises(ValueError, match=r"linear .*table: .*include"):
        sparsify(model)


# ---- modules that read the weights of their children --------------------------------------------------------------


@every_attention
@pytest.mark.parametrize("training", [True, False])
def test_modules_that_bypass_a_forward_get_the_thresholded_weight(build, example, training):
    plain = build().train(training)
    literal = literally_thresholded(plain)
    model = sparsify(plain, **OPTIONS)
    x = example()
    for no_grad in (False, True):
        with torch.inference_mode(no_grad):
            torch.manual_seed(0)
            out = model(x)
            torch.manual_seed(0)
            torch.testing.assert_close(out, literal(x))
        if not no_grad:
            out.square().sum().backward()
    for weight in thresholded_weights(model):
        assert weight.raw.grad.abs().sum() > 0
        assert weight.dense.grad.abs().sum() > 0


class Operations(TorchDispatchMode):
    """Keep the names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_the_encoder_layer_gets_the_thresholded_weights():
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    literal = literally_thresholded(plain)
    model = sparsify(plain, **OPTIONS)
    x, padding = sequence(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), Operations() as called:
        out = model(x, src_key_padding_mask=padding)
    assert "_transformer_encoder_layer_fwd" in called.names
    with torch.no_grad():
        torch.testing.assert_close(out, literal(x, src_key_padding_mask=padding))


def test_the_fast_path_of_attention_gets_the_thresholded_weight():
    plain = Attention().eval()
    literal = literally_thresholded(plain)
    model = sparsify(plain, **OPTIONS)
    x = sequence()
    with torch.no_grad(), Operations() as called:
        out = model(x)
    assert "_native_multi_head_attention" in called.names
    with torch.no_grad():
        torch.testing.assert_close(out, literal(x))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="needs torch 2.13")
def test_linear_cross_entropy_loss_gets_the_thresholded_weight():
    plain = nn.LinearCrossEntropyLoss(8, 4)
    literal = literally_thresholded(plain)
    model = sparsify(plain, **OPTIONS)
    x, target = torch.randn(6, 8), torch.randint(4, (6,))
    loss = model(x, target)
    torch.testing.assert_close(loss, literal(x, target))
    loss.backward()
    assert all(weight.raw.grad.abs() > 0 for weight in thresholded_weights(model))


# ---- training, compiling, saving ----------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 30) -> list[float]:
    x, y = torch.randn(32, 3, 6, 6), torch.arange(32) % 5
    x[torch.arange(32), 0, 0, y] += 6.0
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_an_optimizer_made_before_trains_the_weights():
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    sparsify(model, initial_threshold=0.01)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = train(model, optimizer)
    assert losses[-1] < 0.7 * losses[0]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == name.endswith("raw_threshold")


def test_thresholds_are_trained_with_their_group():
    model = sparsify(ConvNet(), initial_threshold=0.01)
    before = [layer.raw_threshold.item() for layer in str_layers(model).values()]
    losses = train(model, torch.optim.Adam(parameter_groups(model, 1e-4), lr=0.02))
    assert losses[-1] < 0.7 * losses[0]
    assert all(layer.raw_threshold.item() != old for layer, old in zip(str_layers(model).values(), before, strict=True))


class Text(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8, padding_idx=0, max_norm=2.0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.conv = nn.Conv1d(8, 9, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(9, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.encoder(self.embedding(tokens)).transpose(1, 2)).transpose(1, 2))


def test_torch_compile_in_one_graph():
    model = sparsify(Text(), granularity="filter", **OPTIONS)
    eager = copy.deepcopy(model)
    x = tokens()
    out, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(x), eager(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name, atol=1e-4, rtol=1e-4)


def test_a_model_compiled_before_sparsify_computes_with_thresholds():
    model = nn.Sequential(nn.Linear(3, 2))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3)
    compiled(x)
    sparsify(compiled, initial_threshold=10.0)
    torch.testing.assert_close(compiled(x), model[0].bias.expand(2, 2))


# ---- densify ------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["layer", "filter", "weight", "global"])
def test_densify_gives_the_same_bits_and_the_model_of_before(build, example, dtype, granularity):
    model = build()
    classes = {name: type(module) for name, module in model.named_modules()}
    keys, parameters = list(model.state_dict()), list(dict(model.named_parameters()))
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    sparsify(model.to(dtype), granularity=granularity, **OPTIONS)
    with torch.no_grad():
        for weight in thresholded_weights(model):
            weight.raw.add_(0.01 * torch.rand_like(weight.raw))
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    sparse = copy.deepcopy(model)
    assert densify(model) is model

    assert all(torch.equal(parameter, before) for parameter, before in kept)
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == parameters
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    x = example()
    x = x.to(dtype) if x.is_floating_point() else x
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.manual_seed(0)
                expected = sparse.train(training)(x)
                torch.manual_seed(0)
                # torch.matmul chooses its kernel by requires_grad, which a thresholded weight has with a graph only.
                assert torch.equal(model.requires_grad_(grad).train(training)(x), expected)
    for weight in thresholded_weights(sparse):
        assert 0 < (weight.sparse == 0).float().mean() < 1


def test_densified_weights_are_zero_where_the_formula_says():
    model = small()
    literal = literally_thresholded(model)
    densify(sparsify(model, **OPTIONS))
    for (name, value), expected in zip(model.state_dict().items(), literal.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    assert 0 < (model[0].weight == 0).sum() < model[0].weight.numel()


def test_densify_keeps_ties():
    model = densify(sparsify(TiedText(), **OPTIONS))
    assert model.decoder.weight is model.embedding.weight
    assert isinstance(model.decoder.weight, nn.Parameter)
    assert model.again is model.middle
    assert (model.decoder.weight == 0).any()


def test_densify_unties_a_weight_whose_thresholds_differ():
    first, second = STRLinear(4, 4), STRLinear(4, 4)
    second.weight = first.weight
    with torch.no_grad():
        second.raw_threshold.fill_(-1.0)
    model = nn.Sequential(first, second)
    x = torch.randn(3, 4)
    expected = model(x)
    assert torch.equal(densify(model)(x), expected)


def test_densify_keeps_requires_grad_and_layout():
    model = small().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    strides = model[0].weight.stride()
    densify(sparsify(model, include="*"))
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    assert model[3].weight.is_leaf
    assert model[0].weight.stride() == strides


def test_densify_without_thresholded_layers_changes_nothing():
    model = small()
    weight = model[0].weight
    assert densify(model) is model
    assert model[0].weight is weight
    layer = nn.Linear(2, 2)
    assert densify(layer) is layer
