"""The networks by name: plain PyTorch models."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from str_triton.arguments import unknown
from str_triton.cnn.mobilenet import MobileNetV1
from str_triton.cnn.resnet import resnet18, resnet20, resnet34, resnet50, resnet101


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
    """A residual network for small images: a 3x3 stem, then one block per width and stride.

    It maps images [B, in_channels, H, W] of any size to scores [B, num_classes].
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
    """Build a network for 8x8 images: 77,000 weights."""
    return SmallResNet((32, 64), (1, 2), num_classes, in_channels)


def resnet_small(num_classes: int, in_channels: int) -> nn.Module:
    """Build a network for images of about 28x28 pixels: 308,000 weights."""
    return SmallResNet((32, 64, 128), (2, 2, 2), num_classes, in_channels)


def resnet_medium(num_classes: int, in_channels: int) -> nn.Module:
    """Build a network for images of about 32x32 pixels: 1.2 million weights, 0.4 times the FLOPs of ResNet-20."""
    return SmallResNet((32, 64, 128, 256), (2, 2, 2, 2), num_classes, in_channels)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet-digits": resnet_digits,
    "resnet-small": resnet_small,
    "resnet-medium": resnet_medium,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "mobilenetv1": MobileNetV1,
    "tf_mobilenetv1": partial(MobileNetV1, tf=True),
}
WITH_WIDTH = ("mobilenetv1", "tf_mobilenetv1")


def build(name: str, *, num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build a plain dense network with initial weights, from images [B, in_channels, H, W] to scores [B, num_classes].

    Args:
        name: a name in `MODELS`; "mobilenetv1:WIDTH" or "tf_mobilenetv1:WIDTH" for a MobileNetV1 whose layers have
            WIDTH times the channels; or "timm:NAME" for the network that timm, if it is installed, calls NAME. As in
            timm, "tf_" stands for the arithmetic of TensorFlow's weights (see `MobileNetV1`).

    Raises:
        ValueError: an unknown name, a width that is not a positive number, or timm is not installed.
    """
    kind, colon, detail = name.partition(":")
    if kind == "timm" and detail:
        return _from_timm(detail, num_classes, in_channels)
    if kind in WITH_WIDTH and colon:
        return MODELS[kind](num_classes, in_channels, width=_width(name, detail))
    if name not in MODELS:
        raise ValueError(unknown("model", name, [*MODELS, *(f"{kind}:WIDTH" for kind in WITH_WIDTH), "timm:NAME"]))
    return MODELS[name](num_classes, in_channels)


def is_known(name: str) -> bool:
    """Return whether `build` knows the name. timm's names are taken as given."""
    kind, colon, detail = name.partition(":")
    return name in MODELS or bool(colon and detail and (kind in WITH_WIDTH or kind == "timm"))


def _width(name: str, text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = math.nan
    if not 0 < width < math.inf:
        raise ValueError(f"model {name!r}: the width must be a number above 0, such as mobilenetv1:0.5")
    return width


def _from_timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # timm or torchvision is missing, or was built for another PyTorch
        raise ValueError(f"model 'timm:{name}' needs timm ({error}): pip install timm torchvision") from error
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    except RuntimeError as error:  # timm raises it for an unknown name
        raise ValueError(f"model 'timm:{name}': {error}; timm.list_models() lists the names") from error


def state_shapes(name: str, num_classes: int, in_channels: int) -> dict[str, torch.Size]:
    """Return the shapes in a network's state dict, without memory for its weights. Raise ValueError as `build` does."""
    # timm's networks read values while they are built, and meta tensors have none.
    with torch.device("cpu" if name.startswith("timm:") else "meta"):
        state = build(name, num_classes=num_classes, in_channels=in_channels).state_dict()
    return {key: tensor.shape for key, tensor in state.items()}


@torch.no_grad()
def single_value_norms(model: nn.Module, image: Tensor) -> list[str]:
    """Return the names of the batch norms whose input has one value per channel for one image [1, C, H, W].

    PyTorch's batch norm raises an error for such an input in training. The model is not changed.
    """
    found: list[str] = []
    was_training = {module: module.training for module in model.modules()}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: found.append(name) if inputs[0].numel() == inputs[0].shape[1] else None
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    return found
