"""Trackers of accelerate (``--log-with``), which get the numbers of metrics.jsonl."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, WandBTracker

from str_triton.training.errors import UserError, one_line, warn
from str_triton.training.metrics import Record, scalars
from str_triton.training.run_folder import RunFolder

PROJECT = "str-triton"  # the project of wandb, the experiment of mlflow
FILE = "tracker.json"  # which run of the tracker belongs to the folder
TRACKED = ("wandb", "mlflow")


class Tracker:
    """A run of wandb or mlflow. A resumed run continues the tracker's run of its folder.

    Records are sent by the first process of a job only. If the tracker fails during training, the run goes on without
    it, with a warning.
    """

    def __init__(self, name: str, folder: RunFolder, config: Mapping[str, Any]) -> None:
        before = _id(folder.path, name)
        self._name = name
        try:
            self._tracker: GeneralTracker | None = _make(name, folder.path, before)
            self._tracker.start()
            if before is None:
                self._tracker.store_init_configuration(dict(config))
        except Exception as error:  # each tracker has errors of its own
            raise UserError(f"--log-with {name}: {one_line(error)}") from error
        run = self._tracker.tracker
        folder.write(FILE, json.dumps({name: run.id if name == "wandb" else run.info.run_id}))

    def append(self, record: Record) -> None:
        """Send the numbers of a record."""
        if self._tracker is None:
            return
        try:
            self._tracker.log(dict(scalars(record)), step=record["step"])
        except Exception as error:
            warn(f"--log-with {self._name} failed and is switched off: {one_line(error)}")
            self._tracker = None

    def close(self) -> None:
        """End the tracker's run."""
        if self._tracker is not None:
            try:
                self._tracker.finish()
            except Exception as error:
                warn(f"--log-with {self._name}: {one_line(error)}")
            self._tracker = None


def require_tracker(name: str) -> None:
    """Raise `UserError` if the package of a tracker is missing."""
    if name in TRACKED and importlib.util.find_spec(name) is None:
        raise UserError(f"--log-with {name} needs the package {name}: pip install {name}")


def _make(name: str, folder: Path, before: str | None) -> GeneralTracker:
    if name == "wandb":
        return WandBTracker(PROJECT, name=folder.name, dir=str(folder), id=before, resume="allow")
    return MLflowTracker(PROJECT, run_name=folder.name, run_id=before)


def _id(folder: Path, name: str) -> str | None:
    """Return the tracker's run that belongs to a folder; None for a new run."""
    try:
        found = json.loads((folder / FILE).read_text())[name]
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None
