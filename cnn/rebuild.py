"""Building of a trained network from a run folder, one of its files, or a weight file and the network's name."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from str_triton.cnn.arithmetic import warn_of_arithmetic
from str_triton.cnn.class_names import class_change
from str_triton.cnn.config import Config
from str_triton.cnn.models import build, state_shapes
from str_triton.cnn.weights import fill, read_file, recurrent, without_prefix
from str_triton.programs import trained_by
from str_triton.training.command_line import saved_config
from str_triton.training.interface import INTERFACE, Interface
from str_triton.training.run_folder import CONFIG


@dataclass(frozen=True)
class Network:
    """A plain network with its weights, in evaluation mode, on the CPU.

    Attributes:
        model: the module, from images [B, in_channels, H, W] to scores [B, num_classes].
        name: its name in `str_triton.cnn.models`.
        config: the configuration of its run; None if it does not come from a run.
        interface: its inputs and outputs; None if neither the run nor the file holds them.
    """

    model: nn.Module
    name: str
    num_classes: int
    in_channels: int
    config: Config | None
    interface: Interface | None


def require_classes(network: Network, class_names: Sequence[str], where: object) -> None:
    """Raise ValueError, which names ``where``, unless a network was trained for these classes in this order.

    Of a network without an interface only the number of classes is known. See `class_change` for classes without names.
    """
    if network.num_classes != len(class_names):
        raise ValueError(
            f"{where}: its network has {network.num_classes} classes, the data have {len(class_names)} classes"
        )
    change = None if network.interface is None else class_change(network.interface.outputs, class_names, where)
    if change is not None:
        raise ValueError(f"{where}: {change}: the classes and their order must match")


def rebuild(path: str | os.PathLike[str], name: str | None = None, *, unnamed: str = "give --model") -> Network:
    """Build the network in a run folder or in a file of any kind that `str_triton.cnn.weights.read_weights` takes.

    The numbers of classes and channels are read off the weights.

    Args:
        path: the run folder or the file.
        name: the network's name in `str_triton.cnn.models`; by default the one in the run or the file.
        unnamed: the advice in the message for a file without a name.

    Raises:
        ValueError: an unfinished run, not a file of weights, or weights of another network (the message names the first
            key that does not fit).
        OSError: the file cannot be read.
        UserError: the run's configuration is damaged.
    """
    path = Path(path)
    folder = _run_of(path)
    if folder is not None and trained_by(folder) == "train-rnn":
        raise ValueError(recurrent(path))
    config = None if folder is None else saved_config(folder, Config, "train-cnn")
    file = read_file(path)
    said, weights = file.name if config is None else config.model, file.weights
    name = name or said
    if name is None:
        raise ValueError(f"{path}: neither a run nor the file names its network: {unnamed}")
    weights = without_prefix(weights, state_shapes(name, 2, 3).keys())
    num_classes, in_channels = _size(name, weights)
    model = build(name, num_classes=num_classes, in_channels=in_channels)
    fill(model, weights, f"{path}, model {name}")
    warn_of_arithmetic(path, name, said, weights)
    interface = _interface(file.interface, path if path.is_dir() else folder, path, num_classes, in_channels)
    return Network(model.eval(), name, num_classes, in_channels, config, interface)


def _interface(
    held: Interface | None, folder: Path | None, path: Path, num_classes: int, in_channels: int
) -> Interface | None:
    """Return the interface in the weights' file or in its run's folder.

    Raises ValueError if the two contradict each other, or do not fit the network.
    """
    found = held
    if folder is not None and (folder / INTERFACE).is_file():
        found = Interface.read(folder / INTERFACE)
        if held is not None and held != found:
            raise ValueError(
                f"{folder / INTERFACE} contradicts the metadata of the run's model.safetensors: remove or restore it"
            )
    if found is None:
        return None
    if len(found.outputs) != num_classes:
        raise ValueError(f"{path}: {num_classes} scores, but {len(found.outputs)} names for them")
    if found.images is not None and found.images.channels != in_channels:
        raise ValueError(f"{path}: images of {found.images.channels} channels, but the network takes {in_channels}")
    return found


def _run_of(path: Path) -> Path | None:
    """Return the run folder that ``path`` is or belongs to; None if there is none."""
    if path.is_dir():
        folder = path
    elif path.parent.name == "checkpoints":
        folder = path.parent.parent
    elif path.name == "model.safetensors":
        folder = path.parent
    else:
        return None
    return folder if (folder / CONFIG).is_file() else None


def _size(name: str, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the numbers of classes and of input channels of the network whose weights these are."""
    small, classes, channels = (state_shapes(name, *size) for size in ((2, 1), (3, 1), (2, 2)))
    return _differing_size(small, classes, weights, 1000), _differing_size(small, channels, weights, 3)


def _differing_size(
    small: Mapping[str, torch.Size], large: Mapping[str, torch.Size], weights: Mapping[str, Tensor], default: int
) -> int:
    """Return the size, in ``weights``, of the first dimension in which the shapes of two networks differ."""
    for key, shape in small.items():
        if key in weights and shape != large[key] and weights[key].dim() == len(shape):
            dimension = next(i for i, (a, b) in enumerate(zip(shape, large[key], strict=True)) if a != b)
            return weights[key].shape[dimension]
    return default
