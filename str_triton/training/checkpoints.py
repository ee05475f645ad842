"""Checkpoints: tensors and plain values, written whole or not at all, the last two kept."""

import io
import os
import random
import re
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from str_triton.files import replacing
from str_triton.training.errors import UserError, as_user_error, one_line, warn

KEEP = 2
_NAME = re.compile(r"step-(\d+)\.pt")


class Checkpoints:
    """The checkpoints of one run, one file per saved step in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def steps(self) -> list[int]:
        """The saved steps, in rising order."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(name) for name in os.listdir(self.directory))
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is or would be."""
        return self.directory / f"step-{step:09d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``state`` (nested dicts, lists and tuples of tensors and plain values) and drop all but the last two.

        Raises `UserError` when it cannot be written, as on a full disk; the checkpoints of before are then untouched.
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
        """Return the newest checkpoint that is whole, on the CPU; None when none was ever written.

        A checkpoint is whole where its checksums are right and it holds ``keys`` and its own step. A damaged one is
        named in a warning and the one before it is taken; where ``owner`` is true the damaged one is also set aside
        under another name, so that it is not counted among the last two. Raises `UserError` when all are damaged, or
        where the folder cannot be read.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is no directory of checkpoints: remove it, and the run begins again")
        damaged: list[Path] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            with as_user_error(OSError):
                content = path.read_bytes()
            try:
                state = _checked(_decode(content), step, keys)
            except Exception as error:  # damaged bytes surface as almost any exception of zipfile, pickle or torch
                warn(f"the checkpoint {path} is damaged ({one_line(error)[:100]}); trying the one before it")
                damaged.append(path)
                continue
            if owner:
                self._tidy(damaged)
            return state
        if damaged:
            raise UserError(f"no checkpoint in {self.directory} is whole: start the run again in another --run-dir")
        return None

    def _tidy(self, damaged: Sequence[Path]) -> None:
        """Set damaged checkpoints aside, and remove what a kill has left of an unfinished write."""
        with as_user_error(OSError):
            for draft in self.directory.glob(".step-*"):
                draft.unlink()
            for path in damaged:
                path.rename(path.with_name(f"{path.name}.damaged"))

    def _last_whole(self) -> str:
        steps = self.steps()
        return f"the last whole one is {self.path(steps[-1])}" if steps else "there is none before it"


def _decode(content: bytes) -> dict[str, Any]:
    """Return what `torch.save` wrote; raise any exception where a byte of it has changed."""
    damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load does not look at the checksums
    if damaged is not None:
        raise ValueError(f"{damaged} has a wrong checksum")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _checked(state: object, step: int, keys: Collection[str]) -> dict[str, Any]:
    """Return ``state``; raise ValueError unless it is a checkpoint of ``step`` with all ``keys``."""
    if not isinstance(state, dict) or not state.keys() >= set(keys):
        raise ValueError("it is no checkpoint of this program")
    if state["step"] != step:
        raise ValueError(f"it is of step {state['step']!r}")
    return state


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random generators as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned; the states of GPUs only where there are as many as before."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def set_random_state_of(process: int, states: Sequence[dict[str, Any]]) -> None:
    """Put back the state of process number ``process``, whose place in ``states`` it is.

    Where there are fewer, it gets one of its own, which follows from the first of them and its number.
    """
    if process < len(states):
        set_random_state(states[process])
        return
    set_random_state(states[0])
    common = torch.randint(2**62, (), device="cpu").item()
    seeds = np.random.SeedSequence((common, process)).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])  # the GPUs' too
