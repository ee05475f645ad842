"""Checkpoints of tensors and plain values. They are written atomically, and the last two are kept."""

import io
import os
import random
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from str_triton.files import replacing
from str_triton.training.command_line import other_option
from str_triton.training.errors import UserError, as_user_error, one_line, warn
from str_triton.training.fingerprint import Fingerprint
from str_triton.training.interface import INTERFACE, Interface

KEEP = 2
_NAME = re.compile(r"step-(\d+)\.pt")


class Checkpoints:
    """The checkpoints of one run, one file per saved step in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def steps(self) -> list[int]:
        """Return the saved steps, in rising order."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(name) for name in os.listdir(self.directory))
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of ``step``, which may not exist."""
        return self.directory / f"step-{step:09d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``state`` (nested dicts, lists and tuples of tensors and plain values) and delete all but the last two.

        Raises `UserError` if it cannot be written, for example on a full disk. Earlier checkpoints are then kept.
        """
        path = self.path(step)
        try:
            self.directory.mkdir(exist_ok=True)
            with replacing(path) as file:
                torch.save(state, file)
        except OSError as error:
            raise UserError(
                f"the checkpoint {path} cannot be written: {error.strerror or error}; {self._last_whole()}"
            ) from error
        for old in self.steps()[:-KEEP]:
            self.path(old).unlink()
        return path

    def load(self, *, owner: bool = True, keys: Collection[str] = ("step",)) -> dict[str, Any] | None:
        """Return the newest undamaged checkpoint, on the CPU, or None if there is none at all.

        A checkpoint is undamaged if its checksums are right and it holds ``keys`` and its own step. Damaged ones are
        skipped with a warning. With ``owner`` they are also renamed, so that they do not count among the last two.

        Raises `UserError` if all checkpoints are damaged, or if the folder cannot be read.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is not a directory of checkpoints: remove it to start the run again")
        damaged: list[Path] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            with as_user_error(OSError):
                content = path.read_bytes()
            try:
                state = _checked(_decode(content), step, keys)
            except Exception as error:  # damaged bytes make zipfile, pickle and torch raise almost any type
                warn(f"the checkpoint {path} is damaged ({one_line(error)[:100]}); trying the one before it")
                damaged.append(path)
                continue
            if owner:
                self._tidy(damaged)
            return state
        if damaged:
            raise UserError(f"all checkpoints in {self.directory} are damaged: start again in another --run-dir")
        return None

    def _tidy(self, damaged: Sequence[Path]) -> None:
        """Rename damaged checkpoints, and remove the temporary files of writes that a kill has interrupted."""
        with as_user_error(OSError):
            for draft in self.directory.glob(".step-*"):
                draft.unlink()
            for path in damaged:
                path.rename(path.with_name(f"{path.name}.damaged"))

    def _last_whole(self) -> str:
        steps = self.steps()
        return f"the last complete one is {self.path(steps[-1])}" if steps else "there is none before it"


def _decode(content: bytes) -> dict[str, Any]:
    """Load the bytes of a file of `torch.save`. Raise an exception of any type if a byte has changed."""
    damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load does not check the checksums
    if damaged is not None:
        raise ValueError(f"{damaged} has a wrong checksum")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _checked(state: object, step: int, keys: Collection[str]) -> dict[str, Any]:
    """Return ``state``. Raise ValueError unless it is a checkpoint of ``step`` with all ``keys``."""
    if not isinstance(state, dict) or not state.keys() >= set(keys):
        raise ValueError("it is not a checkpoint of this program")
    if state["step"] != step:
        raise ValueError(f"it belongs to step {state['step']!r}")
    return state


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's random generators as tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    name, inner = numpy["bit_generator"], numpy["state"]
    return {
        "python": random.getstate(),
        "numpy": (name, inner["key"].tolist(), inner["pos"], numpy["has_gauss"], numpy["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned. The states of GPUs are restored only if their number is the same."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def set_random_state_of(process: int, states: Sequence[dict[str, Any]]) -> None:
    """Restore the random state of process number ``process`` from ``states``, one for each process.

    If there are fewer states than processes, the process gets a new state, derived from the first one and its number.
    """
    if process < len(states):
        set_random_state(states[process])
        return
    set_random_state(states[0])
    common = int(torch.randint(2**62, (), device="cpu"))
    seeds = np.random.SeedSequence((common, process)).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])  # the GPUs' too


def require_same_interface(own: Interface, state: Mapping[str, Any], folder: Path) -> Interface:
    """Return the interface that a run began with. Raise `UserError`, which names the first difference from ``own``.

    The interface is in the checkpoint ``state``. Checkpoints of older versions lack it: then that in the run's
    ``folder`` counts, which only finished runs have, and otherwise ``own``.
    """
    if "interface" in state:
        began = Interface.of(state["interface"])
    elif (folder / INTERFACE).is_file():
        with as_user_error(ValueError, OSError):
            began = Interface.read(folder / INTERFACE)
    else:
        return own
    change = began.change(own)
    if change is not None:
        raise other_data(folder, change)
    return began


def began_with(state: Mapping[str, Any]) -> dict[str, Fingerprint]:
    """Return the fingerprints in a checkpoint, by part. Older versions wrote at most that of "training"."""
    records = state.get("parts", {"training": state["data"]} if "data" in state else {})
    return {part: Fingerprint(**record) for part, record in records.items()}


def require_same_data(own: Mapping[str, Fingerprint], steps: int, state: Mapping[str, Any], folder: Path) -> None:
    """Raise `UserError`, which names the difference, if the run in ``folder`` began with other data.

    Compares the fingerprints of the parts, ``own``, and the number of steps in an epoch with those that the checkpoint
    ``state`` holds.
    """
    began = began_with(state)
    changes = (began[part].change(now, part) for part, now in own.items() if part in began)
    change = next(filter(None, changes), None)
    if change is None and state.get("steps", steps) != steps:
        change = f"an epoch had {state['steps']} steps, and has {steps} now"
    if change is not None:
        raise other_data(folder, change)


def require_same_networks(own: Mapping[str, str], state: Mapping[str, Any], folder: Path) -> None:
    """Raise `UserError`, which names the option, if an option of the run in ``folder`` now names another network.

    ``own`` are the networks' hashes by option. The checkpoint ``state`` holds them too, if this version wrote it.
    """
    for option, now in own.items():
        if state.get("networks", {}).get(option, now) != now:
            raise UserError(
                f"--{option}: {folder} began with a network of other weights; resume it with the network that it "
                "began with"
            )


def require_shown(
    changed: Mapping[str, tuple[Any, Any]],
    parts: Mapping[str, Fingerprint],
    networks: Mapping[str, str],
    state: Mapping[str, Any],
    folder: Path,
) -> None:
    """Raise `UserError` if data or a network have moved, and the checkpoint ``state`` does not show their contents.

    Call it after `require_same_data` and `require_same_networks`, which find other contents.

    Args:
        changed: the options of the run in ``folder`` that have changed: their values before and now, by field.
        parts: the fingerprints of the data, by part.
        networks: the hashes of networks, by option.
    """
    began, saved = began_with(state), state.get("networks", {})
    shown = {option: option in saved for option in networks}
    shown["data"] = all(part in began and began[part].proves(now) for part, now in parts.items())
    for name, (before, now) in changed.items():
        if not shown.get(name, True):
            raise other_option(folder, name, before, now, "no checkpoint shows that the two are the same")


def other_data(folder: Path, change: str) -> UserError:
    """Return the error for a run in ``folder`` that is resumed with other data; ``change`` is the difference."""
    return UserError(f"{folder} was trained on other data: {change}; resume it with the data that it began with")


def require_same_shapes(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise `UserError`, which names the first differing tensor, unless both state dicts have the same shapes."""
    for key in (*own, *saved):
        now, then = (list(state[key].shape) if key in state else "not there" for state in (own, saved))
        if now != then:
            raise UserError(
                f"the checkpoint belongs to another network: the shape of {key} is {then} in it, {now} here; "
                "resume with the data that the run began with"
            )
