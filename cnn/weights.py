"""Weight files of every kind, read as plain dense tensors. Nothing in a file is ever run as code."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from cnn import paper_checkpoint
from cnn.models import MODELS
from str_triton import densify, deploy, soft_threshold
from str_triton.training.checkpoints import Checkpoints

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
PACKED = "str_triton.packed"  # the format that a packed file's metadata name
RAW_THRESHOLD = "raw_threshold"


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights and buffers in a file or run folder, by the names of the plain network's state dict, on the CPU.

    Takes a folder of `python cnn/train.py` (its model.safetensors; before its end the newest checkpoint), one of its
    checkpoints, a packed file, a checkpoint of the paper's original code, safetensors, and what `torch.save` wrote of a
    state dict, alone or under "state_dict" or "model"; "module." and "_orig_mod." in front of all keys are taken off.
    Thresholds are applied: what comes back is what the network computes with.

    Raises:
        ValueError: anything else; the message names the file, and the first key that does not fit.
        OSError: the file cannot be read.
        UserError: no checkpoint of the run is whole.
    """
    return read_named_weights(path)[0]


def read_named_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """What `read_weights` returns, and the network's name in `cnn.models` where the file itself says it."""
    path = Path(path)
    if path.is_dir():
        return _from_run(path), None
    try:
        content, metadata = _read(path)
    except OSError:
        raise
    except Exception as error:  # what either library raises for a damaged file is anything
        raise ValueError(f"{path}: no file of weights alone: {paper_checkpoint.reason(error)}") from error
    if metadata.get("format") == PACKED:
        return deploy.unpack(path), deploy.inspect(path).metadata.get("model")
    arch = content.get("arch") if isinstance(content, dict) else None
    name = paper_checkpoint.ARCHITECTURES.get(arch, arch) if isinstance(arch, str) else None
    return _weights(path, content), name if name in MODELS else None


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a plain network the weights in a file of any kind that `read_weights` takes, in place.

    Raises as `read_weights` does, and ValueError for weights of another network, naming the first key that does not
    fit. Counts of batches (num_batches_tracked), which old files lack, may be missing.
    """
    fill(model, read_weights(path), path)


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Give a plain network weights that were read before; ``path`` is where they come from. See `load_weights`."""
    expected = model.state_dict()
    for key, tensor in weights.items():
        if key not in expected:
            raise ValueError(f"{path}: the model has no key {key!r}")
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{path}: key {key!r} has the shape {list(tensor.shape)}, the model's is {list(expected[key].shape)}"
            )
    for key in expected:
        if key not in weights and not key.endswith("num_batches_tracked"):
            raise ValueError(f"{path}: the model's key {key!r} is missing")
    model.load_state_dict(weights)


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, and the metadata of safetensors; of a packed file the metadata alone."""
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if not is_safetensors:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        keys = () if metadata.get("format") == PACKED else file.keys()
        return {key: file.get_tensor(key) for key in keys}, metadata


def _from_run(folder: Path) -> dict[str, Tensor]:
    finished = folder / "model.safetensors"
    if finished.exists():
        return read_weights(finished)
    state = Checkpoints(folder / "checkpoints").load(owner=False)
    if state is None:
        raise ValueError(f"{folder}: no run with weights (neither {finished.name} nor a checkpoint)")
    return _weights(folder, state)


def _weights(path: Path, content: Any) -> dict[str, Tensor]:
    """What `read_weights` returns, from what a file holds."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__}")
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    state = content if inner is None else inner
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: no state dict: key {key!r} is not a text")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: no state dict: key {key!r} is {type(value).__name__}, not a tensor")
    if not state:
        raise ValueError(f"{path}: the state dict is empty")
    if state is content.get("state_dict") and _is_papers(content, state):
        return densify(paper_checkpoint.from_content(content, path)[0]).state_dict()
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return _thresholded(path, {key: tensor.detach() for key, tensor in state.items()}, content)


def _is_papers(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    arch = content.get("arch")
    named = isinstance(arch, str) and arch in paper_checkpoint.ARCHITECTURES
    return named or any(key.endswith(".sparseThreshold") for key in state)


def _thresholded(path: Path, state: dict[str, Tensor], content: Mapping[str, Any]) -> dict[str, Tensor]:
    """``state`` with each weight as the raw threshold beside it leaves it, and without raw thresholds."""
    raws = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] == RAW_THRESHOLD}
    if not raws:
        return state
    if "controller" not in content:
        raise ValueError(
            f"{path}: key {next(iter(raws))!r} is a raw threshold, but nothing says which g makes a threshold of it: "
            "save densify(model).state_dict()"
        )
    # Of the methods with thresholds the paper's alone has no controller, and its g is the sigmoid.
    g = "sigmoid" if content["controller"] is None else "exp"
    plain = {key: tensor for key, tensor in state.items() if key not in raws}
    for key, raw in raws.items():
        weight = f"{key.removesuffix(RAW_THRESHOLD)}weight"
        if weight not in plain:
            raise ValueError(f"{path}: key {key!r} has no {weight!r} beside it")
        plain[weight] = soft_threshold(plain[weight], raw, g=g)
    return plain
