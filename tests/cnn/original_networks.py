"""The networks of the original code, written from its description: state dicts of random values, and their forwards."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import oracle

State = dict[str, Tensor]


def add_convolution(state: State, name: str, norm: str | None, *shape: int) -> None:
    state[f"{name}.weight"] = torch.randn(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
    state[f"{name}.sparseThreshold"] = torch.empty(1, 1).uniform_(-6, -4)
    if norm is not None:
        width = shape[0]
        state[f"{norm}.weight"] = 0.2 + 0.3 * torch.rand(width)
        state[f"{norm}.bias"] = 0.1 * torch.randn(width)
        state[f"{norm}.running_mean"] = 0.1 * torch.randn(width)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(width)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(500_400)


def resnet50_state() -> State:
    state: State = {}
    add_convolution(state, "conv1", "bn1", 64, 3, 7, 7)
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            add_convolution(state, f"{at}.conv1", f"{at}.bn1", width, inputs, 1, 1)
            add_convolution(state, f"{at}.conv2", f"{at}.bn2", width, width, 3, 3)
            add_convolution(state, f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1, 1)
            if block == 0:
                add_convolution(state, f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, inputs, 1, 1)
            inputs = 4 * width
    add_convolution(state, "fc", None, 1000, 2048, 1, 1)
    return state


STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def mobilenet_state(classes: int = 1000) -> State:
    state: State = {}
    add_convolution(state, "model.0.0", "model.0.1", 32, 3, 3, 3)
    inputs = 32
    for k, outputs in enumerate((64, 128, 128, 256, 256, *[512] * 6, 1024, 1024), 1):
        add_convolution(state, f"model.{k}.0", f"model.{k}.1", inputs, 1, 3, 3)
        add_convolution(state, f"model.{k}.3", f"model.{k}.4", outputs, inputs, 1, 1)
        inputs = outputs
    add_convolution(state, "fc", None, classes, 1024, 1, 1)
    return state


def convolve(state: State, name: str, x: Tensor, **options) -> Tensor:
    weight = state[f"{name}.weight"]
    if f"{name}.sparseThreshold" in state:
        weight = oracle.soft_threshold(weight, state[f"{name}.sparseThreshold"])
    return F.conv2d(x, weight, **options)


def normalize(state: State, name: str, x: Tensor) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])


def literal_resnet50(state: State, x: Tensor) -> Tensor:
    x = F.relu(normalize(state, "bn1", convolve(state, "conv1", x, stride=2, padding=3)))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(normalize(state, f"{at}.bn1", convolve(state, f"{at}.conv1", x)))
            y = F.relu(normalize(state, f"{at}.bn2", convolve(state, f"{at}.conv2", y, stride=stride, padding=1)))
            y = normalize(state, f"{at}.bn3", convolve(state, f"{at}.conv3", y))
            if block == 0:
                x = normalize(state, f"{at}.downsample.1", convolve(state, f"{at}.downsample.0", x, stride=stride))
            x = F.relu(x + y)
    return convolve(state, "fc", x.mean((2, 3), keepdim=True)).flatten(1)


def literal_mobilenet(state: State, x: Tensor) -> Tensor:
    x = F.relu(normalize(state, "model.0.1", convolve(state, "model.0.0", x, stride=2, padding=1)))
    for k, stride in enumerate(STRIDES, 1):
        x = convolve(state, f"model.{k}.0", x, stride=stride, padding=1, groups=x.shape[1])
        x = F.relu(normalize(state, f"model.{k}.1", x))
        x = F.relu(normalize(state, f"model.{k}.4", convolve(state, f"model.{k}.3", x)))
    return convolve(state, "fc", x.mean((2, 3), keepdim=True)).flatten(1)
