"""MobileNetV1 (Howard et al., 2017): alternating depthwise and pointwise convolutions."""

from torch import Tensor, nn

from str_triton.cnn.resnet import init_weights

# Output channels at width 1 and stride of each pair of convolutions.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """A network from images [B, in_channels, H, W] of any size to scores [B, num_classes].

    The layers are `model.0.0` (3x3 convolution), `model.k.0` and `model.k.3` (depthwise and pointwise convolution) for
    k = 1..13, each followed by a batch norm, and `fc`.

    Args:
        width: factor of the channels of every layer; 1 is the published network.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *, width: float = 1.0) -> None:
        super().__init__()
        channels = max(1, round(32 * width))
        layers = [nn.Sequential(*_convolution(in_channels, channels, 3, 2))]
        for outputs, stride in PAIRS:
            outputs = max(1, round(outputs * width))
            depthwise = _convolution(channels, channels, 3, stride, groups=channels)
            layers.append(nn.Sequential(*depthwise, *_convolution(channels, outputs, 1, 1)))
            channels = outputs
        self.model = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.model(images)).flatten(1))


def _convolution(inputs: int, outputs: int, size: int, stride: int, groups: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
