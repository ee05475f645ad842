"""Finished runs of rnn/train.py, read by the programs that use the trained network."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from str_triton.programs import command
from str_triton.rnn.data import Data, Text
from str_triton.rnn.models import LanguageModel, SequenceClassifier, load_trained
from str_triton.rnn.recipes import Config
from str_triton.training.command_line import require_trained_by
from str_triton.training.config import from_plain
from str_triton.training.errors import UserError, one_line
from str_triton.training.interface import INTERFACE, Interface


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run.

    Attributes:
        folder: the run's folder.
        config: the run's options, from config.json.
        model: the compact network, on the CPU, in evaluation mode.
        outputs: the meaning of the scores: the class names, or the characters of a language model.
        mean, std: float32 [inputs]; the network's input is (features - mean) / std. None: no standardisation.
    """

    folder: Path
    config: Mapping[str, Any]
    model: SequenceClassifier | LanguageModel
    outputs: tuple[str, ...]
    mean: Tensor | None
    std: Tensor | None

    @property
    def name(self) -> str:
        """Return a short description of the network."""
        rnn, cell = self.model.rnn, type(self.model.rnn).__name__.removeprefix("LowRank")
        layers = f"{rnn.num_layers} layers of " if rnn.num_layers > 1 else ""
        direction = "bidirectional " if rnn.bidirectional else ""
        return f"{direction}{cell}, {layers}{rnn.hidden_size} units, trained on {self.config['data']}"


def interface_of(data: Data | Text) -> Interface:
    """Return the names of the outputs and the standardisation of the inputs."""
    if isinstance(data, Text):
        return Interface(tuple(data.vocabulary))
    numbers = data.standardisation
    if numbers is None:
        return Interface(data.class_names)
    return Interface(data.class_names, (tuple(numbers.mean.tolist()), tuple(numbers.std.tolist())))


def open_run(folder: str | Path) -> FinishedRun:
    """Read the folder of a finished run; raise `UserError` for a folder that is missing, unfinished or damaged."""
    from safetensors import SafetensorError, safe_open

    folder, training = Path(folder), command("train-rnn")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of a run of {training}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run of {training}: it has no config.json")
    require_trained_by(folder, "train-rnn")
    weights = folder / "model.safetensors"
    for name in (weights.name, INTERFACE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: the run is not finished, or an older version made it")
    try:
        config = json.loads((folder / "config.json").read_text())
        from_plain(Config, config)
        interface = Interface.read(folder / INTERFACE)
        model = load_trained(folder)
        for key, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{weights.name}: key {key!r} holds NaN or infinite numbers")
        mean, std = _standardisation(interface, model.rnn.input_size)
        scores = (model.decoder if isinstance(model, LanguageModel) else model.classifier).out_features
        if scores != len(interface.outputs):
            raise ValueError(f"{scores} scores, but {len(interface.outputs)} names for them")
        if isinstance(model, LanguageModel) and (long := [text for text in interface.outputs if len(text) != 1]):
            raise ValueError(f"{INTERFACE}: {long[0]!r} is not one character, as each output of a language model is")
        with safe_open(weights, "pt") as file:
            stored = Interface.in_metadata(file.metadata(), weights)
        if stored not in (None, interface):  # None: a run of an older version
            raise ValueError(f"{INTERFACE} contradicts the interface in {weights.name}: one of them is another run's")
        return FinishedRun(folder, config, model, interface.outputs, mean, std)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a run of {training}, or damaged: {one_line(error)}") from error


def _standardisation(interface: Interface, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Return mean and deviation, float32 [size]; raise ValueError for another size."""
    if interface.standardisation is None:
        return None, None
    mean, std = (torch.tensor(numbers, dtype=torch.float32) for numbers in interface.standardisation)
    if len(mean) != size or not bool((std > 0).all()):
        raise ValueError(f"its means and deviations are not {size} numbers that can standardise inputs")
    return mean, std
