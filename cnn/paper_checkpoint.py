"""Reading and writing of checkpoints of the paper's original code: python -m str_triton.cnn.paper_checkpoint FILE.

A file is a dictionary with "state_dict", "arch" ("ResNet50" or "MobileNetV1"), "epoch", "best_acc1" and other entries.
The keys of its state dict begin with "module." after training on several GPUs. Each convolution has, besides `weight`,
`sparseThreshold` [1, 1], the raw threshold s of the threshold sigmoid(s). The classifier `fc` is a 1x1 convolution
without a bias. A "dense-compatible" file has thresholded weights and no `sparseThreshold`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from str_triton import STRConv2d, STRLinear, count, densify, deploy, sparsify
from str_triton.cnn.mobilenet import MobileNetV1
from str_triton.cnn.models import build
from str_triton.cnn.resnet import ResNet
from str_triton.files import replacing, write_atomically
from str_triton.training.errors import UserError, as_user_error, run_program
from str_triton.training.options import OptionParser

ARCHITECTURES = {"ResNet50": "resnet50", "MobileNetV1": "mobilenetv1"}
OPTIONS = ".threshold_options"
PREFIX = "module."


def load(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint of the original code and return its network, on the CPU, and its other entries.

    Returns:
        model: the network of `str_triton.cnn.models`, in training mode. Its layers have the file's weights and raw
            thresholds (g="sigmoid", gradient="masked"). They are plain layers if the file is dense-compatible. `fc` is
            a Linear whose bias is zero and not trained, since the format has no bias.
        metadata: all entries of the file except "state_dict", and "data_parallel": whether the keys begin with
            "module.". `save(model, path, **metadata)` writes the same file again, each tensor bit for bit.

    Raises:
        ValueError: another kind of file; the message names the first key that does not fit.
        OSError: the file cannot be opened.
    """
    return from_content(_read(path), path)


def from_content(content: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Return what `load` returns, from the content of a file that was read before. Messages name ``path``."""
    arch, state = content.get("arch"), content["state_dict"]
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ValueError(f"{path}: key 'arch' is {arch!r}; it must be {' or '.join(map(repr, ARCHITECTURES))}")
    data_parallel = next(iter(state), "").startswith(PREFIX)
    prefix = PREFIX if data_parallel else ""
    fc = state.get(f"{prefix}fc.weight")
    num_classes = fc.shape[0] if isinstance(fc, Tensor) and fc.dim() == 4 else 1000
    thresholds = any(key.endswith(".sparseThreshold") for key in state)
    model = _empty(arch, num_classes, thresholds)
    _check(state, _original_state(model), prefix, f"{path}: {arch}")
    options = {key: tensor for key, tensor in model.state_dict().items() if key.endswith(OPTIONS)}
    model.load_state_dict(_our_state(state, prefix) | options, assign=True)
    model.fc.bias.requires_grad_(False)
    metadata = {key: value for key, value in content.items() if key != "state_dict"}
    return model, metadata | {"data_parallel": data_parallel}


def save(model: nn.Module, path: str | os.PathLike[str], *, data_parallel: bool = False, **metadata: Any) -> None:
    """Write a network as a checkpoint of the original code.

    Args:
        model: "resnet50" or "mobilenetv1" of `str_triton.cnn.models` in float32. Its convolutions and fc each have one
            threshold with g="sigmoid", or, for a dense-compatible file, none has one. The bias of fc must be zero.
        data_parallel: begin each key with "module.", as after training on several GPUs.
        metadata: the file's other entries, such as epoch=100, best_acc1=74.31; numbers, texts and tensors.

    Raises:
        ValueError: a network or an entry that the format cannot hold; the message names the first such key.
        OSError: the file cannot be written.
    """
    arch = {ResNet: "ResNet50", MobileNetV1: "MobileNetV1"}.get(type(model))
    if arch is None:
        raise ValueError(f"{type(model).__name__}: the format only holds cnn/'s resnet50 and mobilenetv1")
    if metadata.get("arch", arch) != arch:
        raise ValueError(f"arch={metadata['arch']!r}: the network is {arch}")
    if "state_dict" in metadata:
        raise ValueError("state_dict comes from the network; leave it out of the metadata")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, STRConv2d | STRLinear)}
    for name, layer in layers.items():
        if layer.g != "sigmoid":
            raise ValueError(f"key '{name}.sparseThreshold': g is {layer.g!r}, and the format only has 'sigmoid'")
    if model.fc.bias is not None and model.fc.bias.any():
        raise ValueError("key 'fc.bias' is not zero, and the format has no bias: train without it")
    state = _original_state(model)
    _check(state, _original_state(_empty(arch, model.fc.out_features, bool(layers))), "", arch)
    prefix = PREFIX if data_parallel else ""
    state = {prefix + key: tensor.cpu() for key, tensor in state.items()}
    with replacing(path) as file:
        torch.save({"arch": arch, "state_dict": state} | metadata, file)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = deploy.read_torch_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary with the key 'state_dict'")
    if not isinstance(content.get("state_dict"), dict):
        found = f"the first key is {next(iter(content))!r}" if content else "it is empty"
        raise ValueError(f"{path}: no state dict under the key 'state_dict'; {found}")
    for key in content["state_dict"]:
        if not isinstance(key, str):
            raise ValueError(f"{path}: key {key!r} is not a text")
    return content


def _empty(arch: str, num_classes: int, thresholds: bool) -> nn.Module:
    """Return the network on the meta device, without values."""
    with torch.device("meta"):
        model = build(ARCHITECTURES[arch], num_classes=num_classes)
        return sparsify(model, g="sigmoid", gradient="masked", raw_threshold_init=0.0) if thresholds else model


def _original_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict with the original code's names and shapes."""
    state = {}
    # Without keep_vars the weights of layers with thresholds would have a leading dimension of 1.
    for key, variable in model.state_dict(keep_vars=True).items():
        tensor = variable.detach()
        layer, _, entry = key.rpartition(".")
        if entry == "raw_threshold":
            state[f"{layer}.sparseThreshold"] = tensor.reshape(1, 1) if tensor.numel() == 1 else tensor
        elif key == "fc.weight":
            state[key] = tensor[:, :, None, None]
        elif key != "fc.bias" and not key.endswith(OPTIONS):
            state[key] = tensor
    return state


def _our_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the state dict for our network from the original code's. The bias of `fc` is zero."""
    ours = {}
    for key, tensor in state.items():
        layer, _, entry = key.removeprefix(prefix).rpartition(".")
        if entry == "sparseThreshold":
            ours[f"{layer}.raw_threshold"] = tensor.detach().reshape(1)
        elif (layer, entry) == ("fc", "weight"):
            ours["fc.weight"] = tensor.detach().flatten(1)
        else:
            ours[f"{layer}.{entry}"] = tensor.detach()
    return ours | {"fc.bias": torch.zeros(len(ours["fc.weight"]))}


def _check(state: Mapping[str, Any], expected: Mapping[str, Tensor], prefix: str, where: str) -> None:
    """Raise ValueError, which names the first key, if keys of ``state`` do not fit or are missing."""
    expected = {prefix + key: tensor for key, tensor in expected.items()}
    for key, tensor in state.items():
        if key not in expected:
            raise ValueError(f"{where} has no key {key!r}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: key {key!r} must be a tensor, got {type(tensor).__name__}")
        for attribute in ("shape", "dtype", "layout"):
            found, wanted = getattr(tensor, attribute), getattr(expected[key], attribute)
            if found != wanted:
                found, wanted = (list(value) if attribute == "shape" else value for value in (found, wanted))
                raise ValueError(f"{where}: key {key!r} has the {attribute} {found}, expected {wanted}")
    for key in expected:
        if key not in state:
            raise ValueError(f"{where}: key {key!r} is missing")


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""
    return run_program(partial(program, args))


def program(args: Sequence[str] | None) -> None:
    """Print the table of a checkpoint, and write the files that ``args`` ask for."""
    purpose = "Sparsity, FLOPs and thresholds of a checkpoint of the paper's original code, layer by layer."
    parser = OptionParser(prog="python -m str_triton.cnn.paper_checkpoint", description=purpose)
    parser.add_argument("file", type=Path, help="the checkpoint")
    parser.add_argument("--to", type=Path, help="write the thresholded weights for a plain network: X.safetensors")
    parser.add_argument("--budget", type=Path, help="write the table: X.csv or X.json")
    options = parser.parse_args(args)
    for option, path, endings in (
        ("--to", options.to, (".safetensors",)),
        ("--budget", options.budget, (".csv", ".json")),
    ):
        if path is not None and path.suffix not in endings:
            raise UserError(f"{option} {path}: the name must end in {' or '.join(endings)}")
    with as_user_error(ValueError, OSError):
        model, metadata = load(options.file)
        budget = count(model, torch.zeros(1, 3, 224, 224))
        plain = (f"{key} {value}" for key, value in metadata.items() if isinstance(value, str | bool | int | float))
        print(f"{options.file}: {', '.join(plain)}\n\n{budget}")
        if options.budget is not None:
            (budget.to_csv if options.budget.suffix == ".csv" else budget.to_json)(options.budget)
        if options.to is not None:
            weights = densify(model).state_dict()
            content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in weights.items()})
            write_atomically(options.to, content)


if __name__ == "__main__":
    sys.exit(main())
