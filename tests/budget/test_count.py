import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

from str_triton.budget.budget import LayerBudget
from str_triton.budget.count import count, counted_weights
from str_triton.nn.control import Control
from str_triton.nn.layers import STRConv2d
from str_triton.nn.low_rank import LowRankWeight
from str_triton.nn.surgery import sparsify
from str_triton.nn.thresholded import thresholded_weights

# ---- the papers' networks ------------------------------------------------------------------------------------------


def covered(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [(weight.name, weight.module, weight.attribute) for weight in counted_weights(model) if weight.covered]


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet50() -> nn.Module:
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks, inputs = [], 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def mobilenet_v1() -> nn.Module:
    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers, inputs = conv(3, 32, 3, 2), 32
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    for outputs, stride in zip((64, 128, 128, 256, 256, *[512] * 6, 1024, 1024), strides, strict=True):
        layers += conv(inputs, inputs, 3, stride, groups=inputs) + conv(inputs, outputs, 1)
        inputs = outputs
    return nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(1024, 1000))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("build", "params", "flops", "pool"),
    [(resnet50, 25_502_912, 4_089_284_608, 100_352), (mobilenet_v1, 4_209_088, 568_790_528, 50_176)],
)
def test_counts_of_the_paper(build, params, flops, pool, device):
    with torch.device("meta"):
        model = build()
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)
    budget = count(model, torch.zeros(1, 3, 224, 224, device=device))
    assert (budget.params, budget.nonzeros, budget.sparsity) == (params, params, 0.0)
    assert (budget.dense_flops, budget.flops) == (flops, flops)
    assert budget.rows[-1] == LayerBudget("(average pools)", 0, 0, pool, pool)


# ---- one layer -----------------------------------------------------------------------------------------------------


def halve(module: nn.Module) -> None:
    """Zeros in the first half of every weight's elements."""
    with torch.no_grad():
        for weight in (p for p in module.parameters() if p.dim() > 1):
            weight.view(-1)[: weight.numel() // 2] = 0


@pytest.mark.parametrize(
    ("layer", "shape", "uses"),
    [
        (nn.Conv1d(4, 6, 3, stride=2), (5, 4, 9), 5 * 4),
        (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=2, groups=2), (2, 4, 8, 5), 2 * 6 * 5),
        (nn.Conv2d(6, 12, 3, groups=6, padding="same", padding_mode="circular"), (6, 7, 5), 7 * 5),
        (nn.Conv3d(2, 4, 2), (3, 2, 4, 3, 5), 3 * 3 * 2 * 4),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (5, 4, 7), 5 * 7),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 3, 5), 2 * 3 * 5),
        (nn.ConvTranspose3d(2, 2, 2), (1, 2, 3, 3, 3), 27),
        (nn.Linear(6, 4), (6,), 1),
        (nn.Linear(6, 4), (3, 6), 3),
        (nn.Linear(6, 4), (2, 3, 5, 6), 30),
        (nn.Linear(6, 4, bias=False), (2, 3, 6), 6),
        (nn.Linear(6, 4), (0, 6), 0),
    ],
)
def test_a_layer_uses_each_element_once_per_position(layer, shape, uses):
    halve(layer)
    n = layer.weight.numel()
    (row,) = count(layer, torch.randn(shape)).rows
    assert row == LayerBudget("", n, n // 2, uses * n, uses * n // 2, None)


def test_linear_on_a_transposed_input():
    assert count(nn.Linear(6, 4), torch.randn(3, 5, 6).transpose(0, 1)).flops == 15 * 24


def test_embeddings_have_weights_and_no_flops():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    budget = count(model, torch.zeros(5, 3, dtype=torch.long))
    assert [(r.name, r.params, r.dense_flops) for r in budget.rows] == [("0", 40, 0), ("2", 24, 120)]
    assert count(nn.EmbeddingBag(10, 4), torch.zeros(5, 3, dtype=torch.long)).params == 40


@pytest.mark.parametrize(
    ("pool", "shape", "flops"),
    [
        (nn.AvgPool1d(2), (2, 3, 8), 48),
        (nn.AvgPool2d(2), (2, 3, 8, 4), 192),
        (nn.AvgPool3d(2), (3, 4, 4, 4), 192),
        (nn.AdaptiveAvgPool1d(1), (2, 3, 8), 48),
        (nn.AdaptiveAvgPool2d(1), (2, 3, 8, 4), 192),
        (nn.AdaptiveAvgPool2d((3, None)), (2, 3, 8, 4), 192),
        (nn.AdaptiveAvgPool3d(2), (3, 4, 4, 4), 192),
        (lambda x: F.adaptive_avg_pool2d(input=x, output_size=1), (2, 3, 8, 4), 192),
        (lambda x: F.avg_pool2d(x, 2) + F.avg_pool2d(x, 2), (2, 3, 8, 4), 384),
        (nn.MaxPool2d(2), (2, 3, 8, 4), 0),
        (nn.AdaptiveMaxPool2d(1), (2, 3, 8, 4), 0),
        (nn.LPPool2d(2, 2), (2, 3, 8, 4), 0),
        (nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.GELU()), (2, 3, 8, 4), 0),
    ],
)
def test_average_pools_cost_their_input_and_nothing_else_does(pool, shape, flops):
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pool(x)

    model = pool if isinstance(pool, nn.Module) else Model()
    budget = count(model, torch.rand(shape))
    assert (budget.params, budget.dense_flops, budget.flops) == (0, flops, flops)


# ---- forwards that go their own way --------------------------------------------------------------------------------


class Functional(nn.Module):
    """Every way around a layer's own forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Linear(7, 7)
        self.register_buffer("h0", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:  # 2 x 4
        x = F.linear(x, self.a.weight) + x @ self.a.weight + torch.einsum("bi,oi->bo", x, self.a.weight)
        x = x + (self.a.weight @ x.T).T + torch.stack([self.a.weight @ row for row in x])
        x = x + F.linear(self.h0, self.a.weight)
        x = x @ x.T @ x  # Activations: not counted.
        return F.conv1d(x[..., None].expand(2, 4, 5), self.b.weight * 1.5)


def test_uses_outside_a_layers_forward_are_counted_and_unused_layers_cost_nothing():
    model = Functional()
    halve(model)
    rows = {row.name: row for row in count(model, torch.randn(2, 4)).rows}
    assert (rows["a"].dense_flops, rows["a"].flops) == (6 * 2 * 16, 6 * 2 * 8)
    assert (rows["b"].dense_flops, rows["b"].flops) == (2 * 3 * 48, 2 * 3 * 24)
    assert (rows["unused"].params, rows["unused"].dense_flops) == (49, 0)


def test_batched_product_with_a_broadcast_weight():
    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight.T.expand(len(x), -1, -1))

    assert count(Model(4, 6), torch.randn(3, 5, 4)).flops == 15 * 24


class Attention(nn.Module):
    def __init__(self, **options: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return self.attn(q, kv, kv)[0]


def test_attention_counts_its_projections_and_not_its_scores():
    q, kv = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    model = Attention()
    with torch.no_grad():
        model.attn.in_proj_weight[:8] = 0  # The queries' part: other parts stay dense.
    budget = count(model, (q, kv))
    names = [(r.name, r.params, r.nonzeros) for r in budget.rows]
    assert names == [("attn.in_proj_weight", 192, 128), ("attn.out_proj", 64, 64)]
    assert [r.dense_flops for r in budget.rows] == [(10 + 6 + 6) * 64, 10 * 64]
    assert budget.rows[0].flops == (6 + 6) * 64
    assert count(model, (q, q)).dense_flops == 4 * 10 * 64


def test_attention_with_projections_of_their_own():
    budget = count(Attention(kdim=6, vdim=6), {"q": torch.randn(2, 5, 8), "kv": torch.randn(2, 3, 6)})
    rows = {r.name: (r.params, r.dense_flops) for r in budget.rows}
    assert rows == {
        "attn.q_proj_weight": (64, 640),
        "attn.k_proj_weight": (48, 288),
        "attn.v_proj_weight": (48, 288),
        "attn.out_proj": (64, 640),
    }


@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_has_no_path_that_is_not_seen(padded):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    budget = count(model, {"src": torch.randn(2, 5, 8), "src_key_padding_mask": mask})
    assert budget.params == 2 * (4 * 64 + 2 * 128)
    assert budget.flops == 10 * budget.params
    assert budget.rows[0].name == "layers.0.self_attn.in_proj_weight"


class Bare(nn.Linear):
    """A covered weight and two Parameters that belong to no layer that `sparsify` knows."""

    def __init__(self):
        super().__init__(4, 4)
        self.projection = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.scale, self.scale * self.weight) @ self.projection


def test_parameters_that_no_layer_owns_have_rows_that_are_not_covered():
    model = Bare()
    halve(model)
    budget = count(model, torch.randn(2, 4))
    assert [(r.name, r.params, r.covered, r.dense_flops, r.flops) for r in budget.rows] == [
        ("", 16, True, 32, 8),  # Half of the rows are zero, and half of what scales the columns.
        ("projection", 16, False, 32, 16),
        ("scale", 4, False, 0, 0),
    ]
    assert (budget.params, budget.nonzeros, budget.sparsity) == (16, 8, 0.5)
    assert (budget.uncovered_params, budget.uncovered_nonzeros) == (20, 10)
    assert (budget.dense_flops, budget.flops) == (64, 24)
    assert covered(model) == [("", model, "weight")]


def test_a_product_of_two_parameters_belongs_to_the_larger_covered_one():
    class Scaled(Bare):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.scale * self.projection)

    assert [r.dense_flops for r in count(Scaled(), torch.randn(2, 4)).rows] == [0, 32, 0]


def test_factors_of_a_matrix_are_rows():
    model = nn.ModuleDict({"weight": LowRankWeight(6, 4, 2), "head": nn.Linear(6, 3)})
    model.forward = lambda x: model["head"](model["weight"](x))
    rows = {r.name: (r.params, r.covered) for r in count(model, torch.randn(5, 4)).rows}
    assert rows == {"weight.u": (12, False), "weight.v": (8, False), "head": (18, True)}


@pytest.mark.parametrize("build", [nn.Transformer, nn.TransformerEncoderLayer, nn.LSTM, nn.Bilinear, Bare])
def test_every_matrix_is_in_exactly_one_row(build):
    options = {nn.Transformer: (8, 2, 1, 1, 16), nn.LSTM: (8, 6, 2), nn.Bilinear: (8, 8, 3)}
    model = build(*options.get(build, () if build is Bare else (8, 2, 16)))
    x = torch.randn(3, 2, 4 if build is Bare else 8)
    budget = count(model, (x, x) if build in (nn.Transformer, nn.Bilinear) else x)
    matrices = [p.numel() for p in model.parameters() if p.dim() > 1]
    assert len({row.name for row in budget.rows}) == len(matrices)
    assert sorted(row.params for row in budget.rows) == sorted(matrices)


def test_weights_with_nan_are_named_once():
    model = nn.Sequential(nn.Linear(4, 4), sparsify(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4).half())
    with torch.no_grad():
        model[0].weight[0, 0] = model[1].dense_weight[0, 0] = torch.nan
        model[3].weight.fill_(60_000)  # Their sum is infinite.
    model.forward = model[:3].forward
    with pytest.warns(UserWarning, match="NaN") as caught:
        budget = count(model, torch.randn(2, 4))
    assert [str(w.message).split(" contain")[0] for w in caught] == ["count: 0, 1"]
    assert caught[0].filename == __file__
    assert budget.rows[2].nonzeros == 16


def test_a_model_whose_controller_is_not_done_is_counted_with_one_warning():
    model, x = sparsify(small()), torch.randn(3, 4)
    model[0].control = model[2].control = Control(status="at 0.5")
    with pytest.warns(UserWarning, match=r"at 0\.5.*finish") as caught:
        _ = [count(model, x) for _ in range(2)]
    assert [w.filename for w in caught] == [__file__]


def test_finite_weights_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(small(), torch.randn(3, 4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.up, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.up(self.tokens(x))))


def test_shared_weights_count_once_for_parameters_and_at_each_use_for_flops():
    model = Tied()
    halve(model)
    budget = count(model, torch.zeros(3, dtype=torch.long))
    assert budget.rows == [LayerBudget("tokens", 40, 20, 120, 60), LayerBudget("up", 16, 8, 96, 48)]
    assert covered(model) == [("tokens", model.tokens, "weight"), ("up", model.up, "weight")]


# ---- weights that are computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: prune.identity(layer, "weight"),
    ],
)
def test_reparametrized_weights_count_as_one_weight(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    budget = count(model, torch.randn(3, 4))
    assert [(r.name, r.params, r.dense_flops) for r in budget.rows] == [("0", 16, 48), ("2", 8, 24)]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_pruned_weight_counts_its_mask():
    layer = nn.Conv2d(2, 4, 3)
    prune.l1_unstructured(layer, "weight", amount=0.75)
    assert count(layer, torch.randn(1, 2, 4, 4)).rows == [LayerBudget("", 72, 18, 4 * 72, 4 * 18)]


def test_parameters_in_one_storage_are_told_apart():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    vector_to_parameters(parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert model[0].weight.untyped_storage() is model[2].weight.untyped_storage()
    assert [r.dense_flops for r in count(model, torch.randn(3, 4)).rows] == [72, 36]


def test_an_activation_written_into_a_copy_of_a_weight_is_an_activation():
    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            memory = torch.zeros_like(self.weight)
            memory += x
            return super().forward(x) @ memory

    assert count(Model(4, 4), torch.randn(4, 4)).flops == 64


# ---- the surroundings ----------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_data_parallel_is_counted_as_the_module_in_it():
    model, x = sparsify(small()), torch.randn(3, 4)
    budget = count(nn.DataParallel(model), x)
    assert [row.name for row in budget.rows] == [f"module.{row.name}" for row in count(model, x).rows]
    assert budget.flops == count(model, x).flops > 0


def test_data_parallel_does_not_hide_a_dense_read():
    class Reader(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self[0].weight)

    with pytest.warns(UserWarning, match=r"dense weight of module\.0"):
        count(nn.DataParallel(sparsify(Reader(nn.Linear(4, 6)))), torch.randn(3, 4))


def test_counted_under_autocast_with_warm_cache():
    model, x = small(), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert count(model, x).flops == 108
        assert model(x).requires_grad
        model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_counted_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        budget = count(model, torch.randn(1, 1, 4, 4))
    assert [r.flops for r in budget.rows] == [32, 6, 32]


def test_compiled_models_are_counted():
    inner = small().eval()
    model = torch.compile(inner, backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    with torch.no_grad():
        model(x)
    budget = count(model, x)
    assert [r.name for r in budget.rows] == ["_orig_mod.0", "_orig_mod.2"]
    assert budget.flops == 108


class Everything(nn.Module):
    """Leaves a trace wherever a forward can."""

    def __init__(self, fail: bool):
        super().__init__()
        self.tokens = nn.Embedding(5, 4, max_norm=0.1)
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
        self.drop.eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2), persistent=False)
        self.fail = fail

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        assert not any(m.training for m in self.modules())
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.last = torch.rand(2)
        x.mul_(2)
        self.train()
        out = self.head(self.norm(x + self.tokens(tokens)))
        if self.fail:
            raise RuntimeError("midway")
        return out


@pytest.mark.parametrize("fail", [False, True])
def test_leaves_everything_as_it_was(fail):
    model = Everything(fail)
    model.head.weight.grad = torch.ones(2, 4)
    hook = model.head.register_forward_hook(lambda *_: None)
    x, tokens = torch.randn(3, 4), torch.tensor([0, 1, 2])
    modes = [m.training for m in model.modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    before = {k: (t, t.clone()) for k, t in tensors.items()}
    rng = torch.get_rng_state()
    if fail:
        with pytest.raises(RuntimeError, match="midway"):
            count(model, (x, tokens))
    else:
        assert count(model, {"x": x, "tokens": tokens}).flops == 24
    after = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    assert after.keys() == before.keys()
    for key, (tensor, value) in before.items():
        assert after[key] is tensor, key
        assert torch.equal(tensor, value), key
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model.head.weight.grad, torch.ones(2, 4))
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert list(model.head._forward_hooks) == [hook.id]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.gpu
def test_leaves_the_random_state_of_the_gpu():
    class Noise(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    rng = torch.cuda.get_rng_state()
    assert count(Noise(4, 4).cuda(), torch.randn(2, 4).cuda()).flops == 32
    assert torch.equal(torch.cuda.get_rng_state(), rng)


@pytest.mark.parametrize("bad", [[torch.zeros(1)], None, "x"])
def test_example_input_of_another_kind_is_refused(bad):
    with pytest.raises(TypeError, match=f"tuple .*dict .*got {type(bad).__name__}"):
        count(small(), bad)


def test_lazy_layer_is_refused_by_name():
    with pytest.raises(ValueError, match="'1' is lazy"):
        count(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)), torch.zeros(1, 2))


# ---- thresholded layers --------------------------------------------------------------------------------------------


def thresholded(model: nn.Module, granularity: str = "layer") -> nn.Module:
    """About half of every weight is below its threshold."""
    model = sparsify(model, g="identity", granularity=granularity)
    with torch.no_grad():
        for weight in thresholded_weights(model):
            weight.raw.fill_(weight.dense.abs().median())
    return model


def half(n: int) -> int:
    """Return how many of n elements `thresholded` leaves: the median itself, the lower of two, is cut."""
    return n - (n + 1) // 2


@pytest.mark.parametrize("granularity", ["layer", "filter", "weight"])
def test_thresholded_layers_count_what_the_threshold_leaves(granularity):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    thresholds = [model[i].weight.detach().abs().median().item() for i in (0, 4)]
    budget = count(thresholded(model, granularity), torch.randn(2, 3, 6, 6))
    conv, linear, pools = budget.rows
    assert conv == LayerBudget("0", 135, half(135), 32 * 135, 32 * half(135), pytest.approx(thresholds[0]))
    assert linear == LayerBudget("4", 15, half(15), 30, 2 * half(15), pytest.approx(thresholds[1]))
    assert pools.flops == 2 * 5 * 16
    assert budget.sparsity == 1 - (half(135) + half(15)) / 150


def test_threshold_is_the_mean_of_many():
    layer = STRConv2d(1, 2, 1, g="identity", granularity="filter")
    with torch.no_grad():
        layer.raw_threshold.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    assert count(layer, torch.zeros(1, 1, 2, 2)).rows[0].threshold == 1.5


def test_one_threshold_for_all_layers_leaves_their_flops_apart():
    rows = count(thresholded(small(), "global"), torch.randn(3, 4)).rows
    assert [(r.name, r.dense_flops) for r in rows] == [("0", 72), ("2", 36)]
    assert rows[0].threshold == rows[1].threshold


def test_thresholded_shared_weights_count_once():
    budget = count(thresholded(Tied()), torch.zeros(3, dtype=torch.long))
    assert [(r.params, r.nonzeros, r.dense_flops, r.flops) for r in budget.rows] == [(40, 20, 120, 60), (16, 8, 96, 48)]


def test_thresholded_children_of_a_module_that_bypasses_them():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rows = {r.name: r for r in count(thresholded(layer), torch.randn(2, 5, 8)).rows}
    for name, params in (("self_attn.out_proj", 64), ("linear1", 128), ("linear2", 128)):
        row = rows[name]
        assert (row.nonzeros, row.dense_flops, row.flops) == (params // 2, 10 * params, 5 * params)
    assert rows["self_attn.in_proj_weight"].flops == 10 * 192 // 2


def test_a_thresholded_layer_whose_dense_weight_is_used_pays_for_all_of_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + F.linear(x, self.layer._parameters["weight"])

    (row,) = count(thresholded(Model()), torch.randn(2, 4)).rows
    assert (row.nonzeros, row.dense_flops, row.flops) == (8, 64, 48)


READERS = {
    "the weight itself": lambda layer, x: layer(x) + F.linear(x, layer.weight),
    "its transpose": lambda layer, x: F.linear(layer(x), layer.weight.T),
    "its sum": lambda layer, x: layer(x) + layer.weight.sum(0),
    "a scaled weight": lambda layer, x: F.linear(x, 2 * layer.weight),
    "another dtype": lambda layer, x: F.linear(x.double(), layer.weight.double()),
}


class Reader(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(4, 4), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layer, x)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_dense_weight_that_the_forward_reads_is_named(read):
    with pytest.warns(UserWarning, match="reads the dense weight of layer"):
        count(sparsify(Reader(read)), torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(sparsify(Reader(read), parameters=["layer.weight"]), torch.randn(2, 4))


@pytest.mark.parametrize("make", [lambda w: w.new_zeros(4), lambda w: torch.ones_like(w)[0], lambda w: w.shape[0]])
def test_the_shape_of_a_dense_weight_may_be_read(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(sparsify(Reader(lambda layer, x: layer(x + make(layer.weight)))), torch.randn(2, 4))


def test_thresholded_model_on_the_meta_device_counts_as_dense():
    (row,) = count(STRConv2d(3, 4, 3, device="meta"), torch.zeros(1, 3, 5, 5, device="meta")).rows
    assert row == LayerBudget("", 108, 108, 972, 972, None)
