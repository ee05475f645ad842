"""Files of plain tensors that are packed and unpacked: safetensors, and what torch.save wrote. None is run as code."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from str_triton.deploy.packed_file import FORMAT, write_beside

SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("state_dict", "model")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of torch.save, alone or under "state_dict" or "model", on the CPU.

    Raises:
        ValueError: anything else, a packed file, or one with raw thresholds; the message names the file and says why.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        content = _safetensors(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what either raises for a damaged file is anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no file of tensors alone: {reason}") from error
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    _check(path, content)
    return content


def write_state(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, or with torch.save where `path` ends in .pt or .pth; beside it and renamed.

    safetensors knows no shared tensors: those are stored under each name.

    Raises ValueError for another ending, OSError where it cannot be written; `path` is then as it was.
    """
    if Path(path).suffix == ".safetensors":
        content = safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()}, {"format": "pt"})
    else:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
    write_beside(path, content)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """ValueError unless `write_state` knows the ending."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path}: the name must end in {', '.join(SUFFIXES)}")


def _safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("format") == FORMAT:
            raise ValueError("it is packed already: python -m str_triton unpack makes plain tensors of it")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)


def _check(path: str | os.PathLike[str], content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: no state dict: {name!r} is {type(tensor).__name__}, not a tensor")
        if name.split(".")[-1] == "raw_threshold":
            raise ValueError(
                f"{path}: {name!r} is a raw threshold, and nothing says which g applies it: give deploy.pack the model "
                "itself, or python -m cnn.export the run"
            )
