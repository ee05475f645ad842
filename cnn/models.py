"""The networks: plain PyTorch models, chosen by name."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut (He et al., 2016): [B, C, H, W] -> [B, width, H', W']."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small images: a 3x3 stem, then a block of each width and stride.

    Images [B, in_channels, H, W] of any size -> scores [B, num_classes].
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        sizes = zip((widths[0], *widths[:-1]), widths, strides, strict=True)
        self.blocks = nn.Sequential(*(ResidualBlock(channels, width, stride) for channels, width, stride in sizes))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        return self.head(self.pool(self.blocks(x)).flatten(1))


def resnet_digits(num_classes: int, in_channels: int) -> nn.Module:
    """For 8x8 images: 77,000 weights."""
    return SmallResNet((32, 64), (1, 2), num_classes, in_channels)


def resnet_small(num_classes: int, in_channels: int) -> nn.Module:
    """For images of about 28x28: 308,000 weights."""
    return SmallResNet((32, 64, 128), (2, 2, 2), num_classes, in_channels)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet-digits": resnet_digits,
    "resnet-small": resnet_small,
}


def build(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """The model called ``name`` with fresh weights; ``ValueError`` that lists the names when there is none."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; the models are {', '.join(MODELS)}")
    return MODELS[name](num_classes, in_channels)
