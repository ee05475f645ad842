"""MobileNetV1 (Howard et al., 2017): alternating depthwise and pointwise convolutions, in two variants."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from str_triton.cnn.resnet import init_weights

# Output channels at width 1 and stride of each pair of convolutions.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
TF_EPSILON = 1e-3


class MobileNetV1(nn.Module):
    """A network from images [B, in_channels, H, W] of any size to scores [B, num_classes].

    The layers are `model.0.0` (3x3 convolution), `model.k.0` and `model.k.3` (depthwise and pointwise convolution) for
    k = 1..13, each followed by a batch norm, and `fc`.

    Args:
        width: factor of the channels of every layer; 1 is the published network.
        tf: compute as TensorFlow's published networks do: ReLU6 in place of ReLU, "SAME" padding (`SamePadding`) in
            place of one row and column of zeros on each side, and 1e-3 as batch norm's epsilon. The names and shapes
            of the weights are the same in both variants.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *, width: float = 1.0, tf: bool = False) -> None:
        super().__init__()
        channels = max(1, round(32 * width))
        layers = [_stage(_convolution(in_channels, channels, 3, 2, tf=tf))]
        for outputs, stride in PAIRS:
            outputs = max(1, round(outputs * width))
            depthwise = _convolution(channels, channels, 3, stride, groups=channels, tf=tf)
            layers.append(_stage([*depthwise, *_convolution(channels, outputs, 1, 1, tf=tf)]))
            channels = outputs
        self.model = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.model(images)).flatten(1))


class SamePadding(nn.Module):
    """Zeros around images [..., H, W], as TensorFlow's padding "SAME" puts them around a convolution's input.

    A convolution of this kernel size and stride, without padding of its own, then has ceil(size / stride) outputs in
    each dimension. An odd number of zeros is split so that the end gets one more than the beginning.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self._zeros(size) for size in x.shape[-2:])
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))

    def _zeros(self, size: int) -> int:
        outputs = -(-size // self.stride)
        return max(0, (outputs - 1) * self.stride + self.kernel - size)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


def _convolution(
    inputs: int, outputs: int, size: int, stride: int, *, groups: int = 1, tf: bool
) -> Iterator[nn.Module]:
    """Yield a convolution, its batch norm and its activation, after a `SamePadding` where it is needed.

    With stride 1 and an odd kernel size, "SAME" is symmetric, and the convolution pads itself.
    """
    padding = size // 2
    if tf and stride > 1:
        yield SamePadding(size, stride)
        padding = 0
    yield nn.Conv2d(inputs, outputs, size, stride, padding=padding, groups=groups, bias=False)
    yield nn.BatchNorm2d(outputs, eps=TF_EPSILON if tf else 1e-5)
    yield nn.ReLU6(inplace=True) if tf else nn.ReLU(inplace=True)


def _stage(modules: Iterable[nn.Module]) -> nn.Sequential:
    """Return the modules in sequence. Only the padding has no number, so both variants' weights have the same names."""
    stage, number = nn.Sequential(), 0
    for module in modules:
        padding = isinstance(module, SamePadding)
        stage.add_module("padding" if padding else str(number), module)
        number += not padding
    return stage
