"""Reading of weight files of all kinds as plain dense tensors. No code in a file is ever run."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from str_triton import densify, deploy, plain_state_dict
from str_triton.cnn import paper_checkpoint
from str_triton.cnn.models import is_known
from str_triton.programs import command
from str_triton.training.interface import Interface
from str_triton.training.run_folder import CONFIG

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""Prefixes of all keys by DistributedDataParallel, torch.compile, and the usual attributes of Lightning modules."""


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights and buffers in a file or run folder, by the keys of the plain network's state dict.

    Thresholds are applied, so the weights are those that the network computes with. They are on the CPU. Prefixes of
    all keys (`PREFIXES`) are removed.

    Args:
        path: the folder of a finished run of `python cnn/train.py`, a checkpoint of the paper's original code, or any
            file that `deploy.read_checkpoint` reads: checkpoints of this program, also those in a run's folder, and of
            other training scripts, packed files, safetensors.

    Raises:
        ValueError: the folder of an unfinished run, or another kind of file; the message names the file, and the first
            key that does not fit.
        OSError: the file cannot be read.
    """
    return read_file(path).weights


@dataclass(frozen=True)
class WeightFile:
    """The content of a file or run folder.

    Attributes:
        weights: what `read_weights` returns.
        name: the network's name in `str_triton.cnn.models`, if the file holds it.
        interface: the network's inputs and outputs, if the file holds them.
    """

    weights: dict[str, Tensor]
    name: str | None
    interface: Interface | None


def read_file(path: str | os.PathLike[str]) -> WeightFile:
    """Read weights and what else is known of the network. Raise as `read_weights`, also for a damaged interface."""
    path = Path(path)
    if path.is_dir():
        file = read_file(_weights_of_run(path))
        return replace(file, name=file.name or _name_in_run(path))
    checkpoint = deploy.read_checkpoint(path)
    if isinstance(checkpoint.others.get("sparse"), dict):
        raise ValueError(f"{path} is a compiled network, for {command('predict')} alone: name the run that it is from")
    arch = checkpoint.others.get("arch", checkpoint.others.get("model"))
    name = paper_checkpoint.ARCHITECTURES.get(arch, arch) if isinstance(arch, str) else None
    known = name if name is not None and is_known(name) else None
    held = checkpoint.others.get("interface")  # in the checkpoints of this program; other files have it in the metadata
    interface = Interface.in_metadata(held if isinstance(held, dict) else checkpoint.others, path)
    if known is None and interface is not None and interface.images is None:
        raise ValueError(recurrent(path))
    return WeightFile(_weights(path, checkpoint), known, interface)


def recurrent(path: object) -> str:
    """Return the message about a recurrent network, which the programs for images do not take."""
    return (
        f"{path} is a recurrent network, not one for images: {command('listen')} takes the run of one for speech, "
        f"{command('generate')} of a language model"
    )


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights in a file of any kind that `read_weights` takes into a plain network.

    Counts of batches (num_batches_tracked), which old files lack, may be missing.

    Raises as `read_weights` does, and ValueError for weights of another network, of a dtype that the model's dtype
    cannot represent, or that are NaN or infinite. The message names the first such key.
    """
    fill(model, without_prefix(read_weights(path), model.state_dict().keys()), path)


def without_prefix(weights: dict[str, Tensor], expected: Set[str]) -> dict[str, Tensor]:
    """Remove the part that most keys begin with, such as "backbone.", if only then a key is among the expected ones.

    Keys without it stay as they are: they belong to something else than the network, such as a loss with weights.
    """
    shorter = weights
    while not expected & shorter.keys():
        counts = Counter(key.partition(".")[0] + "." for key in shorter if "." in key)
        prefix, count = next(iter(counts.most_common(1)), ("", 0))
        shorter = {key.removeprefix(prefix): tensor for key, tensor in shorter.items()}
        if 2 * count <= len(weights) or len(shorter) < len(weights):  # no such part, or two keys have become one
            return weights
    return shorter


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load weights that were read before into a plain network. Messages name ``path``. See `load_weights`."""
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
    model.load_state_dict(
        {key: _converted(tensor, expected[key].dtype, f"{path}: key {key!r}") for key, tensor in weights.items()}
    )


def _converted(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Return the tensor in the model's dtype. Raise ValueError if that would change its values by more than rounding.

    Floating-point numbers of 16, 32 and 64 bits are converted by rounding. Integers and float8, which only encode
    weights, are refused, and so are values outside the range of the model's dtype, NaN and infinity.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        raise ValueError(f"{where} is {kind}; save plain dense tensors")
    floats = dtype.is_floating_point and tensor.dtype.is_floating_point
    if dtype.is_floating_point and not (floats and tensor.dtype.itemsize > 1):
        raise ValueError(f"{where} is of {tensor.dtype}, the model of {dtype}; save floating-point weights")
    if floats and not tensor.isfinite().all():
        raise ValueError(f"{where} holds NaN or infinite numbers")
    converted = tensor.to(dtype)
    if floats and not converted.isfinite().all():
        raise ValueError(f"{where} holds values too large for the model's {dtype}")
    if not floats and (tensor.is_complex() or not torch.equal(converted.to(tensor.dtype), tensor)):
        raise ValueError(f"{where} is of {tensor.dtype} and cannot be converted to {dtype} without a loss")
    return converted


def _weights_of_run(folder: Path) -> Path:
    """Return the file of weights of a finished run; raise ValueError for another folder."""
    weights = folder / "model.safetensors"
    if weights.is_file():
        return weights
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: not a run with weights (no {weights.name})")
    raise ValueError(
        f"{folder} has no {weights.name}: the run is not finished; {command('train-cnn')} --resume --run-dir {folder} "
        "continues it"
    )


def _name_in_run(folder: Path) -> str | None:
    """Return the network's name in a run's config.json; None if there is none."""
    try:
        name = json.loads((folder / CONFIG).read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and is_known(name) else None


def _weights(path: Path, checkpoint: deploy.Checkpoint) -> dict[str, Tensor]:
    """Return the plain network's weights in a checkpoint."""
    state, others = checkpoint.state, checkpoint.others
    if _is_papers(checkpoint):
        return densify(paper_checkpoint.from_content({**others, "state_dict": state}, path)[0]).state_dict()
    if "n_averaged" in state:  # of torch.optim.swa_utils.AveragedModel
        state = {key: tensor for key, tensor in state.items() if key != "n_averaged"}
    while state and (
        prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None)
    ):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    try:
        return plain_state_dict({key: tensor.detach() for key, tensor in state.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_papers(checkpoint: deploy.Checkpoint) -> bool:
    arch = checkpoint.others.get("arch")
    named = isinstance(arch, str) and arch in paper_checkpoint.ARCHITECTURES
    return named or any(key.endswith(".sparseThreshold") for key in checkpoint.state)
