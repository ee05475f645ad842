"""MobileNetV1 with TensorFlow's arithmetic, against the definitions; the warning where weights need the other one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from str_triton import count, densify, deploy, sparsify
from str_triton.cnn.arithmetic import relu6_votes
from str_triton.cnn.export import main as export
from str_triton.cnn.mobilenet import SamePadding
from str_triton.cnn.models import build
from str_triton.cnn.pretrained import start_from
from str_triton.cnn.rebuild import rebuild


def same_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve x [H, W] with weight [k, k] by the definition of SAME: the window of output i begins at i s - before.

    With out = ceil(n / s), the padding has max(0, (out - 1) s + k - n) zeros; the smaller half is before.
    """
    k = len(weight)

    def begins(size: int) -> list[int]:
        outputs = (size + stride - 1) // stride
        before = max(0, (outputs - 1) * stride + k - size) // 2
        return [i * stride - before for i in range(outputs)]

    rows, columns = begins(x.shape[0]), begins(x.shape[1])
    out = torch.zeros(len(rows), len(columns), dtype=x.dtype)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            for a in range(k):
                for b in range(k):
                    if 0 <= top + a < x.shape[0] and 0 <= left + b < x.shape[1]:
                        out[i, j] += weight[a, b] * x[top + a, left + b]
    return out


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 6), (7, 6), (7, 7), (8, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (3, 3), (1, 2), (2, 2), (5, 2), (5, 4)])
def test_padding_is_that_of_the_definition(size: tuple[int, int], kernel: int, stride: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, dtype=torch.float64, generator=generator)
    weight = torch.randn(kernel, kernel, dtype=torch.float64, generator=generator)
    padded = SamePadding(kernel, stride)(x[None, None])
    out = nn.functional.conv2d(padded, weight[None, None], stride=stride)[0, 0]
    torch.testing.assert_close(out, same_convolution(x, weight, stride), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 12), (32, 33)])
def test_the_first_layers_compute_as_tensorflow_does(size: tuple[int, int]):
    """Against the definitions of SAME, of batch norm with an epsilon of 1e-3, and of ReLU6, in float64."""
    torch.manual_seed(0)
    model = build("tf_mobilenetv1:0.1", num_classes=3, in_channels=1).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1e-3)
            module.weight.data.fill_(20.0)
    x = torch.randn(size, dtype=torch.float64)
    state = model.state_dict()

    def norm_and_relu6(y: Tensor, norm: str, channel: int) -> Tensor:
        scale, shift, mean, var = (
            state[f"{norm}.{n}"][channel] for n in ("weight", "bias", "running_mean", "running_var")
        )
        return ((y - mean) / (var + 1e-3).sqrt() * scale + shift).clamp(0, 6)

    first = [
        norm_and_relu6(same_convolution(x, state["model.0.0.weight"][c, 0], 2), "model.0.1", c)
        for c in range(len(state["model.0.0.weight"]))
    ]
    second = [
        norm_and_relu6(same_convolution(y, state["model.1.0.weight"][c, 0], 1), "model.1.1", c)
        for c, y in enumerate(first)
    ]
    assert any((y == 6).any() for y in second)
    torch.testing.assert_close(model.model[0](x[None, None])[0], torch.stack(first))
    own = model.model[1][:3](model.model[0](x[None, None]))[0]
    torch.testing.assert_close(own, torch.stack(second))


def test_both_variants_have_the_same_weights_and_cost():
    plain, tf = (build(name, num_classes=5) for name in ("mobilenetv1:0.25", "tf_mobilenetv1:0.25"))
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, tf)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    for size in (33, 64):
        image = torch.zeros(1, 3, size, size)
        assert count(plain, image).dense_flops == count(tf, image).dense_flops
        assert plain.model(image).shape == tf.model(image).shape
    tf.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    assert not torch.allclose(plain.eval()(image), tf.eval()(image), rtol=0.01)


def made_up(activation: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return weights whose running means are those of inputs of normal distribution under an activation."""
    torch.manual_seed(0)
    state = build("mobilenetv1:0.1", num_classes=3).state_dict()
    z = torch.linspace(0.5 / 400, 1 - 0.5 / 400, 400).double()
    z = 2**0.5 * torch.erfinv(2 * z - 1)
    before = "model.0.1"
    for stage in range(1, 14):
        links = ((before, "0", "1"), (f"model.{stage}.1", "3", "4"))
        for norm, conv, following in links:
            scale, shift = state[f"{norm}.weight"], state[f"{norm}.bias"]
            scale.uniform_(2, 4)
            shift.uniform_(2, 4)
            inputs = activation(shift[:, None] + scale[:, None] * z).mean(1)
            kernel = state[f"model.{stage}.{conv}.weight"].double().sum((2, 3))
            means = kernel[:, 0] * inputs if conv == "0" else kernel @ inputs
            state[f"model.{stage}.{following}.running_mean"].copy_(means)
        before = f"model.{stage}.4"
    return state


def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


def test_statistics_tell_relu6_from_relu():
    votes, channels = relu6_votes(made_up(relu6))
    assert votes == channels > 50
    votes, channels = relu6_votes(made_up(torch.relu))
    assert (votes, channels > 50) == (0, True)
    fresh = build("mobilenetv1:0.1").state_dict()
    assert relu6_votes(fresh)[1] == 0
    assert relu6_votes({}) == (0, 0)


@pytest.mark.parametrize(
    ("activation", "name", "other"),
    [(relu6, "mobilenetv1:0.1", "tf_mobilenetv1:0.1"), (torch.relu, "tf_mobilenetv1:0.1", "mobilenetv1:0.1")],
)
def test_weights_for_the_other_arithmetic_are_warned_of(
    activation: Callable[[Tensor], Tensor], name: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    file = tmp_path / "weights.pt"
    torch.save(made_up(activation), file)
    start_from(file, build(other, num_classes=3), other, 3, class_names="abc")
    rebuild(file, other)
    assert capsys.readouterr().err == ""
    start_from(file, build(name, num_classes=3), name, 3, class_names="abc")
    rebuild(file, name)
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("warning: ")
        assert str(file) in line
        assert f"--model {other}" in line


def test_a_packed_file_keeps_the_variant(tmp_path: Path, capsys: pytest.CaptureFixture):
    name, packed = "tf_mobilenetv1:0.1", tmp_path / "x.packed.safetensors"
    model = build(name, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert export(["pack", str(tmp_path / "x.pt"), str(packed), "--model", name, "--image-size", "40"]) == 0
    again = rebuild(packed)
    image = torch.randn(2, 3, 40, 40)
    assert again.name == name
    assert torch.equal(again.model(image), model(image))
    capsys.readouterr()
    rebuild(packed, "mobilenetv1:0.1")
    assert "--model tf_mobilenetv1:0.1" in capsys.readouterr().err


def test_other_forms_compute_the_same():
    """The first two stages: the whole network takes ten times as long to export."""
    torch.manual_seed(0)
    whole = sparsify(build("tf_mobilenetv1:0.1", num_classes=3), initial_threshold=0.01).eval()
    model, image = whole.model[:2], torch.randn(1, 3, 10, 13)
    with torch.no_grad():
        compiled = deploy.compile_sparse(model, image)
        torch.testing.assert_close(compiled(image), model(image), rtol=0, atol=1e-4)
    assert deploy.export_onnx(densify(whole).model[:2], image).difference < 1e-4
