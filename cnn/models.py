"""The networks: plain PyTorch models, chosen by name."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.mobilenet import MobileNetV1
from cnn.resnet import resnet18, resnet20, resnet34, resnet50, resnet101


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
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "mobilenetv1": MobileNetV1,
}


def build(name: str, *, num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """A plain dense network with fresh weights: images [B, in_channels, H, W] -> scores [B, num_classes].

    Args:
        name: a name in `MODELS`; "mobilenetv1:WIDTH" for a MobileNetV1 whose layers have WIDTH times the channels; or
            "timm:NAME" for the network that timm, if it is installed, calls NAME.

    Raises:
        ValueError: no such name, a width that is no positive number, or timm absent.
    """
    kind, colon, detail = name.partition(":")
    if kind == "timm" and detail:
        return _from_timm(detail, num_classes, in_channels)
    if kind == "mobilenetv1" and colon:
        return MobileNetV1(num_classes, in_channels, width=_width(detail))
    if name not in MODELS:
        names = ", ".join([*MODELS, "mobilenetv1:WIDTH", "timm:NAME"])
        raise ValueError(f"there is no model {name!r}; the models are {names}")
    return MODELS[name](num_classes, in_channels)


def _width(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        width = math.nan
    if not 0 < width < math.inf:
        raise ValueError(f"model 'mobilenetv1:{text}': the width must be a number above 0, such as mobilenetv1:0.5")
    return width


def _from_timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # timm itself, or torchvision, or one made for another PyTorch
        raise ValueError(f"model 'timm:{name}' needs timm ({error}): pip install timm torchvision") from error
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    except RuntimeError as error:  # what timm raises for a name that it does not know
        raise ValueError(f"model 'timm:{name}': {error}; timm.list_models() lists the names") from error


def state_shapes(name: str, num_classes: int, in_channels: int) -> dict[str, torch.Size]:
    """The shapes in a network's state dict, without memory for its weights. Raises as `build` does."""
    # timm's networks compute with values while they are built, which meta tensors have not.
    with torch.device("cpu" if name.startswith("timm:") else "meta"):
        state = build(name, num_classes=num_classes, in_channels=in_channels).state_dict()
    return {key: tensor.shape for key, tensor in state.items()}


@torch.no_grad()
def single_value_norms(model: nn.Module, image: Tensor) -> list[str]:
    """Return the names of the batch norms that see one value per channel when one image [1, C, H, W] goes through.

    In training PyTorch's batch norm refuses such a batch. The model stays as it is.
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
