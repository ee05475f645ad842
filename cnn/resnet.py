"""ResNet (He et al., 2016) with torchvision's state-dict names. A bottleneck has its stride in the 3x3 convolution."""

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, inputs, H, W] -> [B, width, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [B, inputs, H, W] -> [B, 4 * width, H / stride, W / stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """Return a projection if the block changes the shape of its input, else None."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A network from images [B, in_channels, H, W] of any size to scores [B, num_classes].

    Args:
        block: BasicBlock or Bottleneck.
        blocks: the number of blocks in each stage; from stage to stage the width doubles and the image size halves.
        width: the channels of the first stage.
        small_images: begin with one 3x3 convolution, as for CIFAR, instead of a 7x7 convolution and a pooling layer
            that divide the image size by 4.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: int = 64,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if small_images:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        inputs, self.stages = width, [f"layer{index + 1}" for index in range(len(blocks))]
        for index, (stage, count) in enumerate(zip(self.stages, blocks, strict=True)):
            layers = []
            for number in range(count):
                layers.append(block(inputs, width << index, 2 if index > 0 and number == 0 else 1))
                inputs = block.expansion * (width << index)
            setattr(self, stage, nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(self.avgpool(x).flatten(1))


def init_weights(model: nn.Module) -> None:
    """Initialize all weights from Kaiming's normal distribution by fan-in, the classifier's too, as in the paper."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def resnet18(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build ResNet-18: 11,678,912 weights, without norms and biases."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels)


def resnet34(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build ResNet-34: 21,779,648 weights, without norms and biases."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels)


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build ResNet-50: 25,502,912 weights, without norms and biases."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels)


def resnet101(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build ResNet-101: 44,442,816 weights, without norms and biases."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build ResNet-20 for 32x32 images, with projections where the width changes: 270,896 weights (10 classes)."""
    return ResNet(BasicBlock, (3, 3, 3), num_classes, in_channels, width=16, small_images=True)
