import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from str_triton import Budget, count
from str_triton.cnn.models import build
from str_triton.cnn.published import DENSE, POINTS, layer_sparsities

SMALL = ("resnet-digits", "resnet-small", "resnet-medium", "resnet20", "resnet18", "mobilenetv1:0.25")


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return build(name, **options)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 3), (33, 1)])
def test_scores_for_images_of_any_size(name: str, size: int, channels: int):
    model = build(name, num_classes=7, in_channels=channels)
    scores = model(torch.randn(2, channels, size, size))
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "weights"),
    [("resnet-digits", 76_704), ("resnet-small", 307_744), ("resnet-medium", 1_226_528), ("resnet20", 270_608)],
)
def test_number_of_weights(name: str, weights: int):
    model = build(name, num_classes=10, in_channels=1)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1) == weights


# torchvision's documentation gives parameters (norms and biases too) and 1e9 multiply-adds of each ResNet.
@pytest.mark.parametrize(
    ("name", "parameters", "entries", "gflops"),
    [
        ("resnet18", 11_689_512, 122, 1.814),
        ("resnet34", 21_797_672, 218, 3.664),
        ("resnet50", 25_557_032, 320, 4.089),
        ("resnet101", 44_549_160, 626, 7.801),
        ("mobilenetv1", 4_231_976, 164, 0.569),
    ],
)
def test_the_published_sizes_at_224(name: str, parameters: int, entries: int, gflops: float):
    model = on_meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    budget = count(model, torch.zeros(1, 3, 224, 224, device="meta"))
    assert budget.dense_flops / 1e9 == pytest.approx(gflops, abs=1.1e-3)
    if name in DENSE:
        pool = 50_176 if name == "mobilenetv1" else 0  # the paper counts ResNet50's pool and not MobileNetV1's
        assert (budget.params, budget.dense_flops) == (DENSE[name].params, DENSE[name].flops + pool)


BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_names(blocks: tuple[int, ...], convolutions: int, projects_first: bool) -> set[str]:
    def pair(conv: str, norm: str) -> set[str]:
        return {f"{conv}.weight", *(f"{norm}.{entry}" for entry in BATCH_NORM)}

    names = pair("conv1", "bn1") | {"fc.weight", "fc.bias"}
    for stage, count_ in enumerate(blocks, 1):
        for block in range(count_):
            prefix = f"layer{stage}.{block}"
            for i in range(1, convolutions + 1):
                names |= pair(f"{prefix}.conv{i}", f"{prefix}.bn{i}")
            if block == 0 and (stage > 1 or projects_first):
                names |= pair(f"{prefix}.downsample.0", f"{prefix}.downsample.1")
    return names


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet18", torchvision_names((2, 2, 2, 2), 2, projects_first=False)),
        ("resnet20", torchvision_names((3, 3, 3), 2, projects_first=False)),
        ("resnet34", torchvision_names((3, 4, 6, 3), 2, projects_first=False)),
        ("resnet50", torchvision_names((3, 4, 6, 3), 3, projects_first=True)),
        ("resnet101", torchvision_names((3, 4, 23, 3), 3, projects_first=True)),
    ],
)
def test_the_entries_are_called_as_torchvision_calls_them(name: str, names: set[str]):
    assert set(on_meta(name).state_dict()) == names


@pytest.mark.parametrize("name", DENSE)
def test_published_layers_give_published_totals(name: str):
    """All points by arithmetic; the next test prunes real weights."""
    rows = count(on_meta(name), torch.zeros(1, 3, 224, 224, device="meta")).rows
    published = [point for point in POINTS if point.model == name and (name, point.sparsity) in WITH_LAYERS]
    assert len(published) == (16 if name == "resnet50" else 1)
    for point in published:
        zeros = layer_sparsities(name, point.sparsity)
        assert [row.name for row in rows if row.params] == list(zeros)
        densities = [1 - zeros.get(row.name, 0.0) / 100 for row in rows]
        params = sum(density * row.params for density, row in zip(densities, rows, strict=True))
        flops = sum(density * row.dense_flops for density, row in zip(densities, rows, strict=True))
        assert params / 1e6 == pytest.approx(point.params, abs=0.006)
        assert flops / 1e6 == pytest.approx(point.flops, abs=0.7)
        assert 100 * (1 - params / DENSE[name].params) == pytest.approx(point.sparsity, abs=0.006)


WITH_LAYERS = {(p.model, p.sparsity) for p in POINTS if p.model == "resnet50"} | {("mobilenetv1", 89.01)}


def pruned(name: str, sparsity: float) -> Budget:
    """Return the network's cost with the published share of zeros in every layer."""
    model = on_meta(name).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)
        for layer, share in layer_sparsities(name, sparsity).items():
            weight = model.get_submodule(layer).weight.view(-1)
            weight[: round(weight.numel() * share / 100)] = 0
    return count(model, torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("name", "sparsity", "params", "mega_flops"),
    [
        ("resnet50", 81.27, 4_775_866, 705.4),
        ("resnet50", 90.23, 2_492_045, 342.7),
        ("resnet50", 99.10, 229_602, 43.78),
        ("mobilenetv1", 89.01, 462_776, 41.70 + 0.05),  # and the pool
    ],
)
def test_published_points_are_counted(name: str, sparsity: float, params: int, mega_flops: float):
    budget = pruned(name, sparsity)
    assert budget.nonzeros == pytest.approx(params, abs=30)  # half a weight in each layer
    assert budget.flops / 1e6 == pytest.approx(mega_flops, abs=0.06)
    assert 100 * budget.sparsity == pytest.approx(sparsity, abs=0.006)


def test_layers_that_were_not_published_are_refused():
    with pytest.raises(ValueError, match=r"mobilenetv1 at 89.62 %.* resnet50 7"):
        layer_sparsities("mobilenetv1", 89.62)
    with pytest.raises(ValueError, match="vgg"):
        layer_sparsities("vgg", 90.23)


def test_the_seed_decides_the_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build("resnet-digits", num_classes=10, in_channels=1).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv1"])
def test_weights_start_with_the_papers_deviation(name: str):
    model = build(name)
    assert model.fc.out_features == 1000
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    assert not model.fc.bias.any()


def test_a_width_multiplies_every_layer_of_mobilenet():
    """Howard et al. give 0.5 MobileNet 1.3 million parameters and 149 million multiply-adds."""
    half = on_meta("mobilenetv1:0.5")
    assert half.model[0][0].out_channels == 16
    budget = count(half, torch.zeros(1, 3, 224, 224, device="meta"))
    assert round(budget.params / 1e6, 1) == 1.3
    assert budget.dense_flops / 1e6 == pytest.approx(149, abs=1)
    whole = {key: value.shape for key, value in on_meta("mobilenetv1:1").state_dict().items()}
    assert whole == {key: value.shape for key, value in on_meta("mobilenetv1").state_dict().items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vgg",
            "model vgg; .*resnet-digits, .*, mobilenetv1:WIDTH, tf_mobilenetv1:WIDTH, timm:NAME",
        ),
        ("timm:", "model timm:;"),
        ("resnet50:2", "model resnet50:2;"),
        ("mobilenetv1:wide", "'mobilenetv1:wide': .*width.* above 0"),
        ("mobilenetv1:-1", "'mobilenetv1:-1': .*width.* above 0"),
        ("mobilenetv1:inf", "'mobilenetv1:inf': .*width.* above 0"),
        ("tf_mobilenetv1:0", "'tf_mobilenetv1:0': .*width.* above 0"),
        ("mobilenetv1:", "'mobilenetv1:': .*width.* above 0"),
    ],
)
def test_an_unknown_name_is_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        build(name, num_classes=10, in_channels=1)


def stub_of_timm(name: str, *, num_classes: int, in_chans: int) -> nn.Module:
    if name != "some_net.some_tag":
        raise RuntimeError(f"Unknown model ({name})")
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def test_a_network_of_timm(monkeypatch: pytest.MonkeyPatch):
    timm = types.ModuleType("timm")
    timm.create_model = stub_of_timm
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = build("timm:some_net.some_tag", num_classes=5, in_channels=2)
    assert model(torch.zeros(3, 2, 9, 9)).shape == (3, 5)
    with pytest.raises(ValueError, match=r"'timm:some_nat': .*some_nat.* timm\.list_models\(\)"):
        build("timm:some_nat")


def test_timm_that_is_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"'timm:resnet50d' .*pip install timm torchvision"):
        build("timm:resnet50d")


def test_timm_with_a_torchvision_for_another_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"torchvision::nms does not exist.* pip install timm"):
        build("timm:resnet50d")
