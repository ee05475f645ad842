"""Reading and writing of state dicts in files of safetensors and of torch.save. No code in a file is ever run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from str_triton.deploy.pack import inspect, unpack
from str_triton.deploy.packed_file import FORMAT
from str_triton.deploy.torch_files import kind_of, not_weights, read_torch_file
from str_triton.files import is_safetensors, replacing, write_atomically
from str_triton.nn import plain_state_dict
from str_triton.programs import command

SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net", "network")
"""The keys under which training scripts save the weights. Their averages (EMA) have other keys."""
DEEPEST = 3  # the largest number of nested wrappers


@dataclass(frozen=True)
class Checkpoint:
    """A state dict and the other entries of its file.

    Attributes:
        state: tensors by name, on the CPU, with the values and dtypes of the file.
        others: the file's other entries, or the metadata of safetensors or of a packed file. Objects are `Opaque`.
    """

    state: dict[str, Tensor]
    others: dict[Any, Any]

    @classmethod
    def of(cls, content: Any, path: str | os.PathLike[str]) -> "Checkpoint":
        """Find the state dict in `content`, which was read from `path`.

        It is `content` itself, or has one of the keys `WRAPPERS` (the first one counts), or is the only dictionary of
        tensors in it. Raises ValueError, which says what was found instead, if there is none.
        """
        state, others = content, dict[Any, Any]()
        for _ in range(DEEPEST):
            key = _wrapper(state, path)
            if key is None:
                break
            others |= {name: value for name, value in state.items() if name != key}
            state = state[key]
        _check_state(state, path)
        return cls(dict(state), others)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file of safetensors, a packed file, or what torch.save wrote, by the file's content.

    The file of a training script may hold other entries besides the weights, such as an optimizer's state, an
    `argparse.Namespace` or NumPy values. `Checkpoint.of` finds the weights in it.

    Raises:
        ValueError: another kind of file; one line that names the file and the fault.
        OSError: the file cannot be read.
    """
    if not is_safetensors(path):
        return Checkpoint.of(read_torch_file(path), path)
    if is_packed(path):
        return Checkpoint(unpack(path), dict(inspect(path).metadata))
    try:
        with safetensors.safe_open(path, "pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is not a dict)
            metadata = file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # errors of the library, and of torch for a dtype that it lacks
        raise not_weights(path, error) from error
    return Checkpoint(Checkpoint.of(content, path).state, dict(metadata))


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Return whether the file was written by `pack`. Raise as `read_checkpoint` for a damaged safetensors file."""
    if not is_safetensors(path):
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except OSError:
        raise
    except Exception as error:
        raise not_weights(path, error) from error


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the plain model's state dict in a file that `read_checkpoint` reads, with thresholds applied.

    Raises as `read_checkpoint` does, and ValueError for a packed file and for thresholds that cannot be applied.
    """
    if is_packed(path):
        raise ValueError(f"{path}: it is already packed: to get plain tensors, use {command('unpack')}")
    try:
        return plain_state_dict(read_checkpoint(path).state)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def write_state(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write a state dict atomically, as safetensors, or with torch.save if `path` ends in .pt or .pth.

    safetensors has no shared tensors, so they are stored once under each name.

    Raises ValueError for another ending, and OSError if the file cannot be written. `path` is not changed then.
    """
    if Path(path).suffix == ".safetensors":
        apart = {name: tensor.clone() for name, tensor in state.items()}
        write_atomically(path, safetensors.torch.save(apart, {"format": "pt"}))
        return
    with replacing(path) as file:
        torch.save(dict(state), file)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless `write_state` knows the ending."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path}: the name must end in {', '.join(SUFFIXES)}")


def _wrapper(content: Any, path: str | os.PathLike[str]) -> Any:
    """Return the key of the state dict in `content`, or None if it can only be `content` itself."""
    if not isinstance(content, dict) or _is_state(content):
        return None
    key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    if key is not None:
        return key
    found = [key for key, value in content.items() if _is_state(value)]
    if len(found) > 1:
        names = ", ".join(map(repr, found))
        raise ValueError(f"{path}: several state dicts ({names}): save the one that you need in a file of its own")
    return found[0] if found else None


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _check_state(content: Any, path: str | os.PathLike[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a state dict, got {kind_of(content)}; save model.state_dict()")
    if not content:
        raise ValueError(f"{path}: the state dict is empty")
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: no state dict: key {key!r} is not a text")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: no state dict: key {key!r} is {kind_of(value)}, not a tensor")
        if value.is_meta or value.is_nested:
            kind = "a nested tensor" if value.is_nested else "on the meta device, without values"
            raise ValueError(f"{path}: key {key!r} is {kind}; save plain dense tensors")
